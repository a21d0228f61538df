"""KTO on single completions, as Liger has it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.drop_in.liger.base import LinearLoss, Result
from fastdaa.drop_in.liger.shifted_pairs import (
    reference_head,
    row_sums,
    select_shifted_rows,
    summed_logits,
)
from fastdaa.head import LmHead
from fastdaa.losses.unpaired import UnpairedObjective, kto
from fastdaa.outputs import TokenSelection
from fastdaa.selection import moved
from fastdaa.validation import check_positions


class LigerFusedLinearKTOLoss(LinearLoss):
    """KTO (arXiv 2402.01306) on hidden states of completions that are desirable or not.

    Args:
        ignore_index: target of positions that are not scored.
        beta: strength of the KL regularisation.
        compiled, chunk_size: no effect.
        use_ref_model: score ``ref_input``; without it, the reference's log-probs are 0.
        average_log_prob: per-token means in place of sums, of policy and reference (and rewards).

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, compiled, chunk_size)
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self._check()

    def _check(self) -> None:
        UnpairedObjective.parse("kto", beta=self.beta)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> Result:
        """Loss, the mean over completions, and ``(chosen_logps_sum, rejected_logps_sum,
        chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum, rejected_rewards_sum)``.

        Args:
            _input: ``[B, T, D]``. lin_weight: ``[V, D]``. bias: ``[V]``.
            target: ``[B, T]`` int64, shifted by the caller.
            preference_labels: ``[B]`` bool: which completions are desirable ("chosen").
            ref_input: ``[B, T, D']`` of the reference, with its head ``ref_weight [V, D']`` and
                ``ref_bias [V]``; no gradient goes there.
            kl: one number, KTO's baseline in nats; None for 0. No gradient goes there.

        Raises:
            TypeError, ValueError: inputs that do not fit together, or a missing reference.
        """
        self._check()
        selection = moved(select_shifted_rows(target, self.ignore_index), _input.device)
        check_positions("_input", _input, target.shape)
        chosen = _checked_labels(preference_labels, target).to(_input.device)
        head = LmHead(lin_weight, bias)
        policy = self._logps(_input, head, selection)
        ratios = policy - self._reference(selection, target, ref_input, ref_weight, ref_bias)
        losses = kto(ratios, chosen, _baseline(kl, ratios), beta=self.beta)
        loss = losses.mean()
        policy, rewards = policy.detach(), self.beta * ratios.detach()
        results = (
            *(policy.where(rows, 0.0).sum() for rows in (chosen, ~chosen)),
            *(summed_logits(_input, head, rows) for rows in (chosen, ~chosen)),
            *(rewards.where(rows, 0.0).sum() for rows in (chosen, ~chosen)),
        )
        return loss, results

    def _logps(self, hidden_states: Tensor, head: LmHead, selection: TokenSelection) -> Tensor:
        sums = row_sums(hidden_states, head, selection)
        return sums / selection.lengths.clamp(min=1) if self.average_log_prob else sums

    @torch.no_grad()
    def _reference(
        self,
        selection: TokenSelection,
        target: Tensor,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> Tensor | float:
        """Log-probs ``[B]`` of the reference, 0 where there is none."""
        if not self.use_ref_model:
            return 0.0
        return self._logps(*reference_head(ref_input, ref_weight, ref_bias, target), selection)


def _checked_labels(labels: Tensor | None, target: Tensor) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dtype != torch.bool:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"preference_labels: expected a bool tensor, got {got}")
    if labels.shape != target.shape[:1]:
        raise ValueError(
            f"preference_labels: expected shape {list(target.shape[:1])}, one a row of target, got "
            f"{list(labels.shape)}"
        )
    return labels


def _baseline(kl: Tensor | float | None, like: Tensor) -> Tensor:
    if isinstance(kl, Tensor) and kl.numel() != 1:
        raise ValueError(f"kl: expected one number, got shape {list(kl.shape)}")
    if isinstance(kl, Tensor):
        return kl.detach().reshape(()).to(like)
    return like.new_tensor(0.0 if kl is None else kl)
