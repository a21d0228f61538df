"""Weights beside the losses: of tokens that only one completion has, and of whole pairs.

Both multiply what a loss is given or gives, so they go with any loss that
:class:`fastdaa.Objective` lets them go with.
"""

from __future__ import annotations

import torch
from torch import Tensor

LD_DPO = "Liu et al., Length Desensitization in Direct Preference Optimization, arXiv 2409.06411"
WPO = "Zhou et al., WPO: Enhancing RLHF with Weighted Preference Optimization, arXiv 2406.11827"


def tail_tokens(lengths: Tensor, tokens: int) -> Tensor:
    """``[N]`` bool: tokens of a completion beyond the length of the shorter one of its pair.

    Args:
        lengths: ``[S]`` int64 scored tokens of pair-major sequences.
        tokens: their sum ``N``, so that nothing waits for a device.
    """
    shared = lengths.view(-1, 2).amin(dim=1).repeat_interleave(2, output_size=lengths.numel())
    parts = torch.stack([shared, lengths - shared], dim=1).flatten()
    tail = torch.zeros_like(parts, dtype=torch.bool)
    tail[1::2] = True
    return tail.repeat_interleave(parts, output_size=tokens)


def desensitized(token_logps: Tensor, tail: Tensor, alpha: float) -> Tensor:
    """Log-probs ``[n]`` with those of the tail times ``alpha``, as LD-DPO sums them.

    arXiv 2409.06411: a token beyond the length of the shorter completion counts ``alpha`` times.
    At 1 that is DPO, at 0 only as many tokens count as both completions have.
    """
    # Tokens that count nothing do so where the reference excludes them, too.
    weighted = alpha * token_logps if alpha else torch.zeros_like(token_logps)
    return torch.where(tail, weighted, token_logps)


def on_policy_weights(alignments: Tensor, lengths: Tensor) -> Tensor:
    """WPO's weight of every pair, ``[B]`` in (0, 1], without gradient.

    arXiv 2406.11827 with its sampled alignment: the product over both completions of the geometric
    mean, over tokens, of ``p_t / sum_v p_v^2``. The denominator is the probability that a token
    sampled from the policy has on average, so completions that the policy would write itself weigh
    about 1. Capped at 1, as in the authors' code.

    Args:
        alignments: ``[S]`` sums over tokens of ``log p_t - log sum_v p_v^2``, pair-major.
        lengths: ``[S]`` int64 scored tokens of each sequence.
    """
    means = alignments.detach() / lengths.clamp(min=1)
    return means.view(-1, 2).sum(dim=1).exp().clamp(max=1)
