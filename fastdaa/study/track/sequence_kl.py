"""KL(policy || reference) of sampled answers, from hidden states: no logits are kept.

For an answer ``y`` sampled from the policy (Amini, Vieira, Cotterell: Better Estimation of the KL
Divergence Between Language Models, 2025):

- ``k1 = sum_t log pi(y_t | y_<t) - log ref(y_t | y_<t)``;
- ``rb = sum_t KL(pi(. | y_<t) || ref(. | y_<t))``, the expectation of every term of ``k1`` over the
  next token (Rao-Blackwell): unbiased too, and with less variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdaa.data.packs import padded, selection_from
from fastdaa.divergence import token_kl
from fastdaa.head import LmHead
from fastdaa.logps import head_logps, sequence_logps, token_stats
from fastdaa.online.packs import to_device
from fastdaa.selection import select_rows
from fastdaa.train.backbone import causal_lm, run_head_task
from fastdaa.train.references import ReferenceScores
from fastdaa.train.sharding import head_in_force

ScoreReference = Callable[[Mapping[str, Any]], ReferenceScores]
"""From a pack to its scores under the reference, hidden states and head included."""


class AnswerStatistics(NamedTuple):
    """Sums over the tokens of every answer, ``[S]`` fp64 on the CPU, in nats."""

    k1: Tensor
    rb: Tensor
    entropy: Tensor
    """Entropy of the policy's next-token distributions."""


def answer_pack(
    prompts: Sequence[Any], answers: Sequence[Any], pad_id: int, device: torch.device
) -> dict[str, Any]:
    """Prompts with their answers as a right-padded pack that scores the answers' tokens.

    Args:
        prompts, answers: token ids ``[n]``, as tensors on the CPU or lists.
    """
    asked, answered = (
        [np.asarray(ids, dtype=np.int64) for ids in side] for side in (prompts, answers)
    )
    return to_device(padded(asked, answered, pad_id), device)


@torch.no_grad()
def answer_statistics(
    model: nn.Module,
    score_reference: ScoreReference,
    pack: Mapping[str, Any],
    *,
    temperature: float = 1.0,
    max_bytes: int | None = None,
) -> AnswerStatistics:
    """Both estimates and the entropy of every answer of a pack.

    Args:
        model: the policy in eval mode, with ``install_head_task``.
        score_reference: keeps the hidden states of the scored tokens.
        temperature: divides the logits of both.
        max_bytes: memory that the head may take, see :func:`fastdaa.plan_head`.
    """
    ref = score_reference(pack)
    assert ref.rows is not None and ref.head is not None
    ref_rows, ref_head = ref.rows, replace(ref.head, temperature=temperature)
    selection = selection_from(pack)
    core = causal_lm(model)

    def task(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = select_rows(hidden_states.flatten(0, 1), selection.rows)
        with head_in_force(core) as live:
            head: LmHead = replace(live.detach(), temperature=temperature)
            logps, stats = token_stats(rows, head, selection.targets, max_bytes=max_bytes)
            kl = token_kl(rows, head, ref_rows, ref_head, max_bytes=max_bytes)
        return logps, kl, stats.entropy

    logps, kl, entropy = run_head_task(model, pack, task).result
    ref_logps = head_logps(ref_rows, ref_head, selection.targets, max_bytes=max_bytes)
    ratios = logps.double() - ref_logps.double()
    sums = [
        sequence_logps(tokens.double(), selection.lengths).cpu() for tokens in (ratios, kl, entropy)
    ]
    return AnswerStatistics(*sums)
