"""DPO and its relatives, as Liger has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.drop_in.liger.base import LinearPreferenceLoss, Result
from fastdaa.drop_in.liger.shifted_pairs import detached, reference_head, selected_sums
from fastdaa.head import LmHead
from fastdaa.logps import pair_logps
from fastdaa.losses import Objective, sft, token_means
from fastdaa.outputs import PairLogps, TokenSelection
from fastdaa.pair_loss import pair_loss
from fastdaa.validation import check_choice


class LigerFusedLinearDPOLoss(LinearPreferenceLoss):
    """DPO and its relatives on hidden states.

    Args:
        ignore_index: target of positions that are not scored.
        beta: strength of the KL regularisation.
        alpha: weight of the likelihood term.
        compute_nll_loss: add the negative log-likelihood per chosen token.
        compiled, chunk_size: no effect.
        use_ref_model: score ``ref_input``; without it, the reference's log-probs are 0.
        average_log_prob: per-token means in place of sums, of policy and reference (and rewards).
            The loss is then taken outside the head (4U of head work where it is trained, not 3U).
        loss_type: ``"sigmoid"``, ``"hinge"``, ``"exo_pair"``, ``"nca_pair"``, ``"robust"``,
            ``"bco_pair"``, ``"sppo_hard"``, ``"apo_zero"``, ``"apo_down"`` or ``"discopop"``.
        label_smoothing: of ``"robust"`` and ``"exo_pair"``; ``"sigmoid"`` does not read it.
        discopop_tau: of ``"discopop"``.

    Raises:
        ValueError: an unknown loss or a value out of range.
    """

    _LOSS_TYPES = (
        "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
        "apo_down", "discopop",
    )  # fmt: skip

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__(ignore_index, beta, compute_nll_loss, compiled, chunk_size)
        self.alpha, self.use_ref_model = alpha, use_ref_model
        self.average_log_prob = average_log_prob
        self.loss_type = loss_type
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau
        self._objective()

    def _hyperparameters(self) -> dict[str, Any]:
        check_choice("loss_type", self.loss_type, self._LOSS_TYPES)
        if self.loss_type in ("robust", "exo_pair"):
            return {"label_smoothing": self.label_smoothing}
        return {"discopop_tau": self.discopop_tau} if self.loss_type == "discopop" else {}

    def _objective(self) -> Objective:
        return self._with_nll(self.loss_type, self.alpha, **self._hyperparameters())

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Result:
        """Loss and results as in the module's docstring; rewards are ``chosen [B], rejected [B]``.

        Args:
            ref_input: ``[2B, T, D']`` of the reference, with its head ``ref_weight [V, D']`` and
                ``ref_bias [V]``; no gradient goes there.

        Raises:
            TypeError, ValueError: inputs that do not fit together, or a missing reference.
        """
        head = LmHead(lin_weight, bias)
        selection = self._select(_input, target)
        ref = self._reference(selection, target, ref_input, ref_weight, ref_bias)
        if self.average_log_prob:
            ref = token_means(ref)
            loss, sums = self._loss_of_means(_input, head, selection, ref)
            return loss, self._results(_input, head, sums, True, ref)
        ref_logps = torch.stack([ref.chosen, ref.rejected], dim=1).flatten()
        out = pair_loss(_input, head, selection, self._objective(), ref_logps=ref_logps)
        return out.loss, self._results(_input, head, out.policy, False, ref)

    @torch.no_grad()
    def _reference(
        self,
        selection: TokenSelection,
        target: Tensor,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> PairLogps:
        """Summed log-probs of the reference, 0 where there is none."""
        if not self.use_ref_model:
            zeros = torch.zeros(len(target), device=selection.lengths.device)
            return pair_logps(zeros, selection.lengths)
        return selected_sums(*reference_head(ref_input, ref_weight, ref_bias, target), selection)

    def _loss_of_means(
        self, hidden_states: Tensor, head: LmHead, selection: TokenSelection, ref: PairLogps
    ) -> tuple[Tensor, PairLogps]:
        """The loss on per-token means, and the detached sums that it was made of."""
        sums = selected_sums(hidden_states, head, selection)
        objective = Objective.parse(self.loss_type, beta=self.beta, **self._hyperparameters())
        loss = objective(token_means(sums), ref).mean()
        if self.compute_nll_loss:
            loss = loss + self.alpha * sft(sums, None).mean()
        return loss, detached(sums)
