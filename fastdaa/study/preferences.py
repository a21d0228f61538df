"""Preference pairs: two responses of the reference, labelled by a Bradley-Terry judge of gold."""

from __future__ import annotations

from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from fastdaa.study.world import World, draw_responses

TRAIN_SEED, HELD_OUT_SEED = 0, 1
"""Seeds of the pairs within a world, which has a seed of its own."""


class Pairs(NamedTuple):
    """Numbers of prompts and responses, each ``[n]`` int64."""

    prompts: Tensor
    chosen: Tensor
    rejected: Tensor

    def margins(self, values: Tensor) -> Tensor:
        """``[n]``: chosen less rejected, of any ``values [P, R]``."""
        return values[self.prompts, self.chosen] - values[self.prompts, self.rejected]

    def __len__(self) -> int:
        return len(self.prompts)


def draw_pairs(world: World, ref_logps: Tensor, gold: Tensor, n: int, seed: int) -> Pairs:
    """``n`` pairs of two different responses each, drawn from the reference.

    The first is chosen with probability ``sigmoid(gold(first) - gold(second))`` (Bradley and
    Terry 1952), so labels disagree with gold as often as close margins deserve.

    Args:
        ref_logps: ``[P, R]``.
        gold: ``[P, R]`` anchored.

    Raises:
        ValueError: ``n`` below 1.
    """
    if n < 1:
        raise ValueError(f"n: expected at least one pair, got {n}")
    generator = torch.Generator().manual_seed((world.seed * 1_000_003 + seed) * 16 + 2)
    prompts = torch.randint(world.language.prompts, (n,), generator=generator)
    first = draw_responses(ref_logps, prompts, generator)
    second = draw_responses(ref_logps, prompts, generator)
    while (same := first == second).any():
        second[same] = draw_responses(ref_logps, prompts[same], generator)
    margin = gold[prompts, first] - gold[prompts, second]
    wins = torch.rand(n, generator=generator, dtype=torch.float64) < margin.sigmoid()
    return Pairs(prompts, torch.where(wins, first, second), torch.where(wins, second, first))


def as_dataset(world: World, pairs: Pairs) -> Dataset:
    """Token columns ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, as the trainer takes them."""
    language = world.language
    return Dataset.from_dict(
        {
            "prompt_ids": [language.prompt_ids(p) for p in pairs.prompts.tolist()],
            "chosen_ids": [language.completion_ids(r) for r in pairs.chosen.tolist()],
            "rejected_ids": [language.completion_ids(r) for r in pairs.rejected.tolist()],
        }
    )


def preference_pairs(world: World, ref_logps: Tensor, gold: Tensor, n: int, seed: int) -> Dataset:
    """The pairs of :func:`draw_pairs` as a dataset; the same arguments give the same pairs."""
    return as_dataset(world, draw_pairs(world, ref_logps, gold, n, seed))


def label_agreement(pairs: Pairs, gold: Tensor) -> float:
    """Share of pairs whose chosen response has more gold, ties half: what labels can teach."""
    margins = pairs.margins(gold)
    return float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean())
