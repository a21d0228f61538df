"""Randomness that depends on the seed and the place in the run alone, so that a run can resume."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor


class Purpose(enum.IntEnum):
    """What random numbers are for; those of different purposes have nothing to do with another."""

    PROMPTS = 0
    ROLLOUTS = 1
    MINIBATCHES = 2
    CRITIC = 3


def seed_of(seed: int, place: int, purpose: Purpose) -> int:
    """One seed from the run's seed, an iteration or pass, and a purpose."""
    return ((seed * 1_000_003 + place) * len(Purpose) + purpose) % 2**63


def generator(seed: int, place: int, purpose: Purpose) -> torch.Generator:
    """A generator of its own for every iteration and purpose."""
    return torch.Generator().manual_seed(seed_of(seed, place, purpose))


def prompts_of(prompts: Sequence[Tensor], count: int, iteration: int, seed: int) -> list[Tensor]:
    """The prompts of an iteration: pass after pass over all of them, each in an order of its own.

    Args:
        prompts: all of them.
        count: how many an iteration takes.
    """
    chosen: list[Tensor] = []
    position = iteration * count
    while len(chosen) < count:
        number, offset = divmod(position, len(prompts))
        order = torch.randperm(
            len(prompts), generator=generator(seed, number, Purpose.PROMPTS)
        ).tolist()
        taken = order[offset : offset + count - len(chosen)]
        chosen += [prompts[index] for index in taken]
        position += len(taken)
    return chosen
