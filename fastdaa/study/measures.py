"""What a policy is like, exactly: sums over all responses, no samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.study.world import World


class Measures(NamedTuple):
    """Means over prompts, under the policy unless said otherwise; Python floats."""

    kl: float
    """``KL(policy || reference)``, nats a response."""
    kl_forward: float
    """``KL(reference || policy)``, nats a response."""
    gold: float
    """Expected gold reward; 0 for the reference, in its standard deviations."""
    win_rate: float
    """Probability that a response of the policy has more gold than one of the reference; a tie
    counts half."""
    entropy: float
    """Nats a response."""
    length: float
    """Expected content tokens, EOS not counted."""
    violations: float
    """Expected same-class neighbours of a response."""
    max_prob: float
    """Probability of the likeliest response."""


def measure(world: World, logps: Tensor, ref_logps: Tensor, gold: Tensor) -> Measures:
    """Exact measures of a policy.

    Args:
        logps, ref_logps: ``[P, R]`` log-probs of policy and reference.
        gold: ``[P, R]`` anchored gold reward.

    Raises:
        ValueError: log-probs of another shape, or that do not sum to one.
    """
    _check(logps, gold, "logps")
    _check(ref_logps, gold, "ref_logps")
    probs, ref = logps.exp(), ref_logps.exp()
    divergence = (_times(probs, logps - ref_logps)).sum(1)
    forward = (_times(ref, ref_logps - logps)).sum(1)
    return Measures(
        kl=float(divergence.mean()),
        kl_forward=float(forward.mean()),
        gold=float((probs * gold).sum(1).mean()),
        win_rate=win_rate(probs, ref, gold),
        entropy=float(-_times(probs, logps).sum(1).mean()),
        length=float((probs @ world.lengths.double()).mean()),
        violations=float((probs @ world.repeats.double()).mean()),
        max_prob=float(probs.amax(1).mean()),
    )


def win_rate(probs: Tensor, ref_probs: Tensor, gold: Tensor) -> float:
    """``P(gold(y) > gold(y')) + P(gold(y) = gold(y')) / 2``, y from the first, y' from the second.

    Written as one half of 1 + P(win) - P(loss): two equal distributions give 0.5 to the last bit,
    and swapping the two gives 1 less it.

    Args:
        probs, ref_probs: ``[P, R]``, rows that sum to one.
        gold: ``[P, R]``; equal numbers are ties.
    """
    margin = 0.0
    for ours, theirs, values in zip(probs, ref_probs, gold, strict=True):
        _, group = torch.unique(values, return_inverse=True)
        groups = int(group.max()) + 1
        mine = ours.new_zeros(groups).index_add_(0, group, ours)
        other = theirs.new_zeros(groups).index_add_(0, group, theirs)
        wins = mine * (other.cumsum(0) - other)
        losses = other * (mine.cumsum(0) - mine)
        margin += float((wins - losses).sum())
    return 0.5 + 0.5 * margin / len(probs)


def _times(weights: Tensor, values: Tensor) -> Tensor:
    """Product in which a weight of zero wins over an infinite value."""
    return torch.where(weights > 0, weights * values, 0.0)


def _check(logps: Tensor, gold: Tensor, name: str) -> None:
    if logps.shape != gold.shape:
        raise ValueError(f"{name}: expected shape {list(gold.shape)}, got {list(logps.shape)}")
    mass = logps.exp().sum(1)
    if not ((mass - 1).abs() < 1e-4).all():
        raise ValueError(
            f"{name}: expected log-probs of all responses, which sum to 1, got sums from "
            f"{float(mass.min()):.6f} to {float(mass.max()):.6f}"
        )
