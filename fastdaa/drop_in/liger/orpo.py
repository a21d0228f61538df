"""ORPO, as Liger has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdaa.drop_in.liger.base import LinearPreferenceLoss, Result
from fastdaa.drop_in.liger.shifted_pairs import detached, selected_sums
from fastdaa.head import LmHead
from fastdaa.losses import Objective, sft, token_means
from fastdaa.losses.reference_free import LARGEST_MEAN_LOGP
from fastdaa.outputs import PairLogps
from fastdaa.pair_loss import pair_loss
from fastdaa.validation import check_indices


class LigerFusedLinearORPOLoss(LinearPreferenceLoss):
    """ORPO on hidden states: likelihood plus ``beta`` times the odds-ratio loss, no reference.

    Mean log-probs above ``-1e-6`` are capped there, where Liger's odds become infinite.

    Args:
        ignore_index, compiled, chunk_size: as in :class:`LigerFusedLinearDPOLoss`.
        beta: weight of the odds-ratio loss.
        compute_nll_loss: add the negative log-likelihood per chosen token. Without it, or with an
            ``nll_target``, the loss is taken outside the head (4U of head work, not 3U).

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, compute_nll_loss, compiled, chunk_size)
        Objective.parse("orpo", beta=beta)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Result:
        """Loss and results as in the module's docstring.

        Log-probs and rewards are of per-token means. Rewards are ``chosen [B], rejected [B]``, the
        mean ``log sigmoid`` of the log-odds ratios, and their mean.

        Args:
            nll_target: ``[2B, T]`` int64, the targets of the likelihood term if they are others,
                for example with the prompt; its rejected half is not read.

        Raises:
            TypeError, ValueError: inputs that do not fit together.
        """
        head = LmHead(lin_weight, bias)
        selection = self._select(_input, target)
        if nll_target is not None:
            check_indices("nll_target", nll_target, target.shape)
        nll = None
        if self.compute_nll_loss and nll_target is None:
            out = pair_loss(_input, head, selection, Objective.parse("orpo", beta=self.beta))
            loss, sums = out.loss, out.policy
        else:
            traced = selected_sums(_input, head, selection)
            loss = -self.beta * F.logsigmoid(_log_odds_ratios(traced)).mean()
            sums = detached(traced)
            if self.compute_nll_loss and nll_target is not None:
                nll = self._nll(_input, head, nll_target)
                loss = loss + nll
        results = self._results(_input, head, sums, True)
        if nll is not None:
            results = (*results[:4], nll.detach(), *results[5:])
        ratios = _log_odds_ratios(sums)
        return loss, (*results, F.logsigmoid(ratios).mean(), ratios.mean())

    def _nll(self, hidden_states: Tensor, head: LmHead, target: Tensor) -> Tensor:
        """Negative log-likelihood per token of the chosen half under targets of its own."""
        pairs = len(target) // 2
        target = torch.cat([target[:pairs], torch.full_like(target[pairs:], self.ignore_index)])
        selection = self._select(hidden_states, target)
        return sft(selected_sums(hidden_states, head, selection), None).mean()


def _log_odds_ratios(sums: PairLogps) -> Tensor:
    """``[B]`` log of the ratio of the odds ``exp(m) / (1 - exp(m))`` of both means ``m``."""

    def log_odds(mean: Tensor) -> Tensor:
        # The cap and expm1 are those of fastdaa's orpo, which gives the loss itself.
        mean = mean.clamp(max=LARGEST_MEAN_LOGP)
        return mean - torch.log(-torch.expm1(mean))

    means = token_means(sums)
    return log_odds(means.chosen) - log_odds(means.rejected)
