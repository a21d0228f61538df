"""Losses that judge each completion of a pair on its own, not only their difference.

``a`` and ``b`` are the log-ratios of the chosen and rejected completions. Every function returns
the losses ``[B]``, unreduced, in the dtype of the log-probabilities.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdaa.losses.elementary import sigmoid
from fastdaa.losses.margin import logratios
from fastdaa.outputs import PairLogps


def apo_zero(policy: PairLogps, ref: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): ``1 - sigmoid(beta a) + sigmoid(beta b)``.

    Raises chosen and lowers rejected; for data better than the reference's own answers.
    APO is anchored preference optimisation, and not APA.
    """
    a, b = logratios(policy, ref)
    return sigmoid(-beta * a) + sigmoid(beta * b)


def apo_down(policy: PairLogps, ref: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): ``sigmoid(beta a) + 1 - sigmoid(beta (a - b))``.

    Lowers both, rejected more; for data worse than the reference's own answers.
    """
    a, b = logratios(policy, ref)
    return sigmoid(beta * a) + sigmoid(-beta * (a - b))


def nca_pair(policy: PairLogps, ref: PairLogps, *, beta: float = 0.1) -> Tensor:
    """NCA for pairs (arXiv 2402.05369), which keeps the chosen likelihood from falling.

    ``-log sigmoid(beta a) - 0.5 log sigmoid(-beta a) - 0.5 log sigmoid(-beta b)``.
    """
    a, b = logratios(policy, ref)
    noise = F.logsigmoid(-beta * a) + F.logsigmoid(-beta * b)
    return -F.logsigmoid(beta * a) - 0.5 * noise


def bco_pair(policy: PairLogps, ref: PairLogps, *, beta: float = 0.1) -> Tensor:
    """BCO for pairs (arXiv 2404.04656): ``-log sigmoid(beta a) - log sigmoid(-beta b)``.

    As in TRL since 0.29, the paper's running reward shift is left at 0.
    """
    a, b = logratios(policy, ref)
    return -F.logsigmoid(beta * a) - F.logsigmoid(-beta * b)


def sppo_hard(policy: PairLogps, ref: PairLogps, *, beta: float = 0.1) -> Tensor:
    """SPPO with hard labels (arXiv 2405.00675): ``(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2``."""
    a, b = logratios(policy, ref)
    target = 1 / (2 * beta)
    return (a - target).square() + (b + target).square()
