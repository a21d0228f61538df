"""The gold reward: what responses are worth, known exactly and never shown to a policy."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.study.language import Language
from fastdaa.study.presets import Preset

GOOD_LENGTH = 4
LENGTH_BONUS, OVERLONG_COST, EMPTY_COST = 0.5, 1.0, 2.0
# Sums of the same weights in another order differ in the last bits; ties have to be ties.
_DECIMALS = 9


def raw_gold(language: Language, weights: Tensor, preset: Preset) -> Tensor:
    """Gold reward before scaling.

    ``sum of the prompt's token weights + 0.5 min(len, 4) - penalty * (same-class neighbours)
    - max(0, len - 4) - 2 [empty]``

    Args:
        weights: ``[P, T]`` fp64, worth of one token by prompt.

    Returns:
        ``[P, R]`` fp64, rounded to 9 decimals, so that equal rewards are equal numbers.
    """
    lengths = language.lengths.double()
    shape = LENGTH_BONUS * lengths.clamp(max=GOOD_LENGTH)
    shape -= preset.penalty * language.repeats.double()
    shape -= OVERLONG_COST * (lengths - GOOD_LENGTH).clamp(min=0)
    shape -= EMPTY_COST * (lengths == 0).double()
    return torch.round(weights @ language.counts.double().T + shape, decimals=_DECIMALS)


def anchor(gold: Tensor, ref_logps: Tensor) -> Tensor:
    """Shift and scale so that the reference has mean 0 and standard deviation 1.

    The mean is taken off prompt by prompt, which no comparison of responses to one prompt sees.
    The standard deviation is that within prompts, pooled: one scale for all of them.

    Args:
        gold: ``[P, R]``.
        ref_logps: ``[P, R]`` log-probs of the reference.

    Returns:
        ``[P, R]`` fp64; ties stay ties.
    """
    probs = ref_logps.double().exp()
    probs = probs / probs.sum(1, keepdim=True)
    centred = gold - (probs * gold).sum(1, keepdim=True)
    variance = (probs * centred.square()).sum(1).mean()
    return centred / variance.sqrt()
