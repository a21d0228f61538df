"""Losses that couple the pairs of a batch, so that it cannot be split into chunks.

"The batch" is what the function is given: one device's micro-batch. The losses ``[B]`` are
unreduced and in the dtype of the log-probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.losses.elementary import LARGEST, sigmoid
from fastdaa.losses.margin import logratios, smoothed_logistic
from fastdaa.outputs import PairLogps


def kto(
    policy: PairLogps,
    ref: PairLogps,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (arXiv 2402.01306) on pairs, the mean over the two completions of a pair.

    ``(w_d (1 - sigmoid(beta (a - z0))) + w_u (1 - sigmoid(beta (z0 - b)))) / 2``. The paper
    estimates the KL baseline z0 on mismatched prompts and completions, which a batch of pairs does
    not have. Here ``z0 = max(0, mean log-ratio of all 2B completions of the batch)``, without
    gradient and the same for both sides. It needs no further forward pass, but it is an estimate on
    the data and not on the policy's samples.
    """
    a, b = logratios(policy, ref)
    bounded = torch.cat([a, b]).detach().clamp(-LARGEST, LARGEST)  # a completion that ref excludes
    baseline = bounded.mean().clamp(min=0)
    chosen = desirable_weight * sigmoid(-beta * (a - baseline))
    rejected = undesirable_weight * sigmoid(-beta * (baseline - b))
    return (chosen + rejected) / 2


def aot(
    policy: PairLogps, ref: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """AOT, paired (arXiv 2406.05882): quantiles of the policy's margins against the reference's.

    Sorts ``log policy(chosen) - log policy(rejected)`` and the same of the reference over the
    batch, and applies the logistic loss to beta times their difference. Entry i belongs to rank
    i, not to pair i.
    """
    policy_margins = (policy.chosen - policy.rejected).sort().values
    ref_margins = (ref.chosen - ref.rejected).sort().values
    return smoothed_logistic(beta * (policy_margins - ref_margins), label_smoothing)


def aot_unpaired(
    policy: PairLogps, ref: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """AOT, unpaired (arXiv 2406.05882): quantiles of chosen against rejected log-ratios.

    Entry i belongs to rank i, not to pair i.
    """
    a, b = logratios(policy, ref)
    x = beta * (a.sort().values - b.sort().values)
    return smoothed_logistic(x, label_smoothing)
