"""One pack through the policy: loss, exact KL and load balancing, inside the model's forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fastdaa.data import selection_from
from fastdaa.divergence import token_kl
from fastdaa.head import LmHead
from fastdaa.losses import Objective
from fastdaa.outputs import BatchTotals, PairLossOutput
from fastdaa.pair_loss import pair_loss
from fastdaa.train.backbone import causal_lm, run_head_task
from fastdaa.train.balance import balance_of
from fastdaa.train.references import ReferenceScores
from fastdaa.train.sharding import head_in_force

if TYPE_CHECKING:
    from fastdaa.train.config import PreferenceConfig


class PackResult(NamedTuple):
    """What a pack gives."""

    loss: Tensor
    """Scalar with gradient: the pack's share of the loss of the batch."""
    output: PairLossOutput
    """The loss of the pairs alone, and what it was made of."""
    kl: Tensor | None
    """``[N]`` exact KL to the reference, if the reference kept its hidden states."""
    aux_loss: Tensor | None
    """Load-balancing loss of a mixture of experts, detached, before its weight."""


def run_policy(
    model: nn.Module,
    pack: Mapping[str, Any],
    objective: Objective,
    ref: ReferenceScores | None,
    totals: BatchTotals,
    args: PreferenceConfig,
) -> PackResult:
    """Run the policy on a pack.

    Args:
        model: any wrapping of a model with ``install_head_task``.
        pack: see :class:`~fastdaa.data.PairCollator`.
        ref: the same pack under the reference.
        totals: sizes of the whole micro-batch.
        args: settings of the head and the statistics.
    """
    core = causal_lm(model)
    selection = selection_from(pack)
    # Losses on pairs alone may train on data that has them.
    advantages = pack.get("advantages") if objective.has_token_level else None

    def task(hidden_states: Tensor) -> tuple[PairLossOutput, Tensor | None]:
        with head_in_force(core) as head:
            output = pair_loss(
                hidden_states, head, selection, objective,
                ref_logps=None if ref is None else ref.sequence_logps,
                ref_token_logps=None if ref is None else ref.token_logps,
                completion_lengths=pack["completion_lengths"], advantages=advantages,
                totals=totals, stats=args.log_token_stats,
                impl=args.impl, engine=args.head_engine, max_bytes=args.head_max_bytes,
            )  # fmt: skip
            kl = exact_kl(hidden_states, head, selection.rows, ref, args.head_max_bytes)
        return output, kl

    (output, kl), aux_loss = run_head_task(model, pack, task)
    loss = output.loss
    if aux_loss is not None:
        weight = balance_of(core) or 0.0
        # Of several packs each counts by its pairs.
        loss = loss + weight * len(selection.counts) / (2 * totals.pairs) * aux_loss
        aux_loss = aux_loss.detach()
    return PackResult(loss, output, kl, aux_loss)


def exact_kl(
    hidden_states: Tensor,
    head: LmHead,
    rows: Tensor,
    ref: ReferenceScores | None,
    max_bytes: int | None,
) -> Tensor | None:
    """KL ``[N]`` to the reference at every scored token; None unless it kept its hidden states."""
    if ref is None or ref.rows is None or ref.head is None:
        return None
    flat = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
    scored = flat.index_select(0, rows)
    return token_kl(scored, head.detach(), ref.rows, ref.head, max_bytes=max_bytes)
