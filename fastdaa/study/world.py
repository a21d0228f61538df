"""A world: the source that the reference learns from, and the gold reward of every response."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastdaa.study.gold import anchor, raw_gold
from fastdaa.study.language import LANGUAGE, Language
from fastdaa.study.presets import Preset, preset_of


@dataclass(frozen=True)
class World:
    """Everything that a preset and a seed decide; made by :func:`make_world`."""

    preset: Preset
    seed: int
    weights: Tensor
    """``[P, T]`` fp64: gold reward of one token, by prompt, before scaling."""
    favourites: Tensor
    """``[P, T]`` fp64: log-preference of the source for each token within its class."""
    language: Language = LANGUAGE

    @cached_property
    def gold(self) -> Tensor:
        """``[P, R]`` fp64, gold reward in its own units; see :meth:`anchored`."""
        return raw_gold(self.language, self.weights, self.preset)

    @cached_property
    def lengths(self) -> Tensor:
        """``[R]`` int64, content tokens of each response."""
        return self.language.lengths

    @cached_property
    def repeats(self) -> Tensor:
        """``[R]`` int64, same-class neighbours of each response: violations."""
        return self.language.repeats

    def anchored(self, ref_logps: Tensor) -> Tensor:
        """``[P, R]`` fp64 gold reward with mean 0 and unit deviation under the reference."""
        return anchor(self.gold, ref_logps)

    @cached_property
    def source_logps(self) -> Tensor:
        """``[P, R]`` fp64, exact log-probs of the source of the fine-tuning data.

        Its responses are not empty. The first token is of any class, every next one of another
        class than the one before it but for ``violations``; within a class the prompt's
        favourites decide. After each token the response ends with probability ``stop``.
        """
        language, preset = self.language, self.preset
        grouped = self.favourites.unflatten(1, (language.classes, language.class_size))
        within = grouped.log_softmax(-1).flatten(1)
        table = language.table
        token_logps = within[:, table.clamp(min=0)].masked_fill(table < 0, 0.0).sum(-1)
        lengths, repeats = self.lengths, self.repeats
        switches = (lengths - 1).clamp(min=0) - repeats
        stay = torch.tensor(preset.violations, dtype=torch.float64)
        leave = (1 - stay) / (language.classes - 1)
        stop = torch.tensor(preset.stop, dtype=torch.float64)
        ends = (lengths < language.longest).double()
        shape = (
            torch.xlogy(repeats.double(), stay)
            + torch.xlogy(switches.double(), leave)
            + torch.xlogy((lengths - 1).clamp(min=0).double(), 1 - stop)
            + torch.xlogy(ends, stop)
            - torch.log(torch.tensor(language.classes, dtype=torch.float64))
        )
        shape[lengths == 0] = -torch.inf
        return token_logps + shape

    def sft_sequences(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """``[count]`` prompts and ``[count]`` numbers of responses, drawn from the source."""
        generator = torch.Generator().manual_seed(_stream(self.seed, seed, 1))
        prompts = torch.randint(self.language.prompts, (count,), generator=generator)
        return prompts, draw_responses(self.source_logps, prompts, generator)


def make_world(preset: str | Preset, seed: int, language: Language = LANGUAGE) -> World:
    """The world of a preset and a seed, always the same.

    Raises:
        ValueError: an unknown preset.
    """
    generator = torch.Generator().manual_seed(_stream(seed, 0, 0))
    preset = preset_of(preset)
    shape = (language.prompts, language.tokens)
    weights = preset.token_weights * torch.randn(shape, generator=generator, dtype=torch.float64)
    favourites = preset.favourites * torch.randn(shape, generator=generator, dtype=torch.float64)
    return World(preset, seed, weights, favourites, language)


def draw_responses(logps: Tensor, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers ``[S]`` of responses to ``prompts [S]``, drawn from the exact ``logps [P, R]``."""
    cumulative = logps.double().exp().cumsum(1)
    points = torch.rand(len(prompts), generator=generator, dtype=torch.float64)
    numbers = torch.empty_like(prompts)
    for prompt in range(len(logps)):
        chosen = prompts == prompt
        row = cumulative[prompt]
        numbers[chosen] = torch.searchsorted(row, points[chosen] * row[-1], right=True)
    return numbers.clamp(max=logps.shape[1] - 1)


def _stream(seed: int, part: int, purpose: int) -> int:
    """One seed from three, so that worlds, data and pairs of neighbouring seeds share nothing."""
    return (seed * 1_000_003 + part) * 16 + purpose
