"""CPO and SimPO, as Liger has them."""

from __future__ import annotations

from torch import Tensor

from fastdaa.drop_in.liger.base import LinearPreferenceLoss, Result
from fastdaa.head import LmHead
from fastdaa.losses import Objective
from fastdaa.pair_loss import pair_loss


class LigerFusedLinearCPOLoss(LinearPreferenceLoss):
    """CPO on hidden states: no reference, plus the likelihood of the chosen completions.

    Args:
        ignore_index, compiled, chunk_size: as in :class:`LigerFusedLinearDPOLoss`.
        beta: factor on the log-prob difference.
        alpha: weight of the likelihood term.
        label_smoothing: probability that a label is flipped.
        compute_nll_loss: add the negative log-likelihood per chosen token.
        average_log_prob: per-token means in place of sums, also in rewards.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, compute_nll_loss, compiled, chunk_size)
        self.alpha, self.label_smoothing = alpha, label_smoothing
        self.average_log_prob = average_log_prob
        self._objective()

    def _objective(self) -> Objective:
        smoothing = {"label_smoothing": self.label_smoothing}
        if self.average_log_prob:  # CPO on per-token means is SimPO without a margin
            return self._with_nll("simpo", self.alpha, gamma=0.0, **smoothing)
        return self._with_nll("cpo", self.alpha, nll_weight=0.0, **smoothing)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Result:
        """Loss and results as in the module's docstring; rewards are ``chosen [B], rejected [B]``.

        Raises:
            TypeError, ValueError: inputs that do not fit together.
        """
        head = LmHead(lin_weight, bias)
        out = pair_loss(_input, head, self._select(_input, target), self._objective())
        return out.loss, self._results(_input, head, out.policy, self.average_log_prob)


class LigerFusedLinearSimPOLoss(LinearPreferenceLoss):
    """SimPO on hidden states: per-token means, a target margin, no reference.

    As in Liger the likelihood term is on by default; Meng et al. (arXiv 2405.14734) have none.

    Args:
        ignore_index, compiled, chunk_size: as in :class:`LigerFusedLinearDPOLoss`.
        beta: factor on the difference of the means.
        alpha: weight of the likelihood term.
        label_smoothing: probability that a label is flipped.
        compute_nll_loss: add the negative log-likelihood per chosen token.
        gamma: target margin, not multiplied by beta.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, compute_nll_loss, compiled, chunk_size)
        self.alpha, self.label_smoothing, self.gamma = alpha, label_smoothing, gamma
        self._objective()

    def _objective(self) -> Objective:
        return self._with_nll(
            "simpo", self.alpha, gamma=self.gamma, label_smoothing=self.label_smoothing
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Result:
        """Loss and results as in the module's docstring; rewards are ``chosen [B], rejected [B]``.

        Log-probs and rewards are of per-token means.

        Raises:
            TypeError, ValueError: inputs that do not fit together.
        """
        head = LmHead(lin_weight, bias)
        out = pair_loss(_input, head, self._select(_input, target), self._objective())
        return out.loss, self._results(_input, head, out.policy, True)
