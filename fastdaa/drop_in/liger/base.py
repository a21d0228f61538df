"""Arguments and results that all of the losses share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdaa.drop_in.liger.shifted_pairs import mean_logit, select_shifted_pairs
from fastdaa.head import LmHead
from fastdaa.losses import Objective, implicit_rewards, sft, token_means
from fastdaa.outputs import PairLogps, TokenSelection
from fastdaa.selection import moved
from fastdaa.validation import check_positions

Result = tuple[Tensor, tuple[Tensor, ...]]
"""The loss, and the tuple of other results."""


class LinearLoss(nn.Module):
    """What all losses share; attributes may be changed between calls, as with Liger."""

    def __init__(self, ignore_index: int, beta: float, compiled: bool, chunk_size: int) -> None:
        super().__init__()
        if not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
        self.ignore_index, self.beta = ignore_index, beta
        self.compiled, self.chunk_size = compiled, chunk_size

    def extra_repr(self) -> str:
        """The arguments."""
        return ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "training"
        )


class LinearPreferenceLoss(LinearLoss):
    """What the losses of pairs share."""

    def __init__(
        self,
        ignore_index: int,
        beta: float,
        compute_nll_loss: bool,
        compiled: bool,
        chunk_size: int,
    ) -> None:
        super().__init__(ignore_index, beta, compiled, chunk_size)
        self.compute_nll_loss = compute_nll_loss

    def _with_nll(self, loss: str, alpha: float, **hyperparameters: Any) -> Objective:
        """``loss`` and, if wanted, ``alpha`` times the likelihood of the chosen completions."""
        names, weights = [loss], [1.0]
        if self.compute_nll_loss:
            names, weights = [loss, "sft"], [1.0, alpha]
        return Objective.parse(names, weights=weights, beta=self.beta, **hyperparameters)

    def _select(self, hidden_states: Tensor, target: Tensor) -> TokenSelection:
        selection = select_shifted_pairs(target, self.ignore_index)
        check_positions("_input", hidden_states, target.shape)
        return moved(selection, hidden_states.device)

    def _results(
        self,
        hidden_states: Tensor,
        head: LmHead,
        sums: PairLogps,
        means: bool,
        ref: PairLogps | None = None,
    ) -> tuple[Tensor, ...]:
        """Log-probs, mean logits, likelihood term and rewards, from detached sums."""
        shown = token_means(sums) if means else sums
        chosen, rejected = hidden_states.chunk(2)
        nll = sft(sums, None).mean() if self.compute_nll_loss else sums.chosen.new_zeros(())
        return (
            shown.chosen, shown.rejected, mean_logit(chosen, head), mean_logit(rejected, head), nll,
            *implicit_rewards(shown, ref, self.beta),
        )  # fmt: skip
