"""Losses without a reference model; their second argument is accepted and not read.

Every function returns the losses ``[B]``, unreduced, in the dtype of the log-probabilities.
Likelihood terms of ``sft``, ``cpo`` and ``orpo`` are means over all chosen tokens of the batch:
they take ``totals`` when they see a chunk of it, and else count the tokens that they are given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdaa.losses.margin import smoothed_logistic
from fastdaa.outputs import BatchTotals, PairLogps

LARGEST_MEAN_LOGP = -1e-6
"""ORPO's odds are capped at this mean log-probability: at 0 they are infinite."""


def sft(policy: PairLogps, ref: PairLogps | None, *, totals: BatchTotals | None = None) -> Tensor:
    """Negative log-likelihood per chosen token (TRL's ``sft``).

    ``-log policy(chosen) * pairs / chosen_tokens``, so that the mean over the pairs of the batch is
    the mean over all of its chosen tokens.
    """
    if totals is None:
        scaled = policy.chosen * policy.chosen.numel()
        return -scaled / policy.chosen_lengths.sum().clamp(min=1)
    return -policy.chosen * totals.pairs / max(totals.chosen_tokens, 1)


def slic_hf(
    policy: PairLogps,
    ref: PairLogps | None,
    *,
    delta: float = 1.0,
    regularization: float = 0.1,
) -> Tensor:
    """SLiC-HF (arXiv 2305.10425): ``max(0, delta - log policy(chosen) + log policy(rejected))``.

    Plus ``regularization * -log policy(chosen)``, a sum over tokens: the paper's cross-entropy
    term with the chosen completion as its target.
    """
    hinge = torch.relu(delta - (policy.chosen - policy.rejected))
    return hinge - regularization * policy.chosen if regularization else hinge


def simpo(
    policy: PairLogps,
    ref: PairLogps | None,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): DPO on per-token mean log-probabilities with a margin.

    ``-log sigmoid(beta * (mean chosen - mean rejected) - gamma)``.
    """
    chosen, rejected = _mean_logps(policy)
    return smoothed_logistic(beta * (chosen - rejected) - gamma, label_smoothing)


def cpo(
    policy: PairLogps,
    ref: PairLogps | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
    totals: BatchTotals | None = None,
) -> Tensor:
    """CPO (arXiv 2401.08417): DPO with a uniform reference, plus ``nll_weight`` times ``sft``."""
    losses = smoothed_logistic(beta * (policy.chosen - policy.rejected), label_smoothing)
    return losses + nll_weight * sft(policy, None, totals=totals) if nll_weight else losses


def orpo(
    policy: PairLogps,
    ref: PairLogps | None,
    *,
    beta: float = 0.1,
    totals: BatchTotals | None = None,
) -> Tensor:
    """ORPO (arXiv 2403.07691): ``sft`` plus beta times the odds-ratio loss; beta is its lambda.

    Odds are those of the per-token mean log-probability m, ``exp(m) / (1 - exp(m))``, with m
    capped at ``LARGEST_MEAN_LOGP`` (an empty completion, a certain policy).
    """
    chosen, rejected = _mean_logps(policy)
    odds_ratio = F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return sft(policy, None, totals=totals) - beta * odds_ratio


def _mean_logps(policy: PairLogps) -> tuple[Tensor, Tensor]:
    chosen = policy.chosen / policy.chosen_lengths.clamp(min=1)
    rejected = policy.rejected / policy.rejected_lengths.clamp(min=1)
    return chosen, rejected


def _log_odds(mean_logps: Tensor) -> Tensor:
    # expm1 keeps 1 - exp(m) accurate where m is close to 0, which is where the odds are large.
    mean_logps = mean_logps.clamp(max=LARGEST_MEAN_LOGP)
    return mean_logps - torch.log(-torch.expm1(mean_logps))
