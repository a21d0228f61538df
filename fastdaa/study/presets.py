"""What a world is made of, and how its policies are trained: presets H and M, and model sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

Named = TypeVar("Named")


@dataclass(frozen=True)
class Preset:
    """A kind of world; the seed of :func:`fastdaa.study.world.make_world` does the rest.

    Raises:
        ValueError: a number out of its range.
    """

    name: str
    penalty: float
    """Gold reward lost by each pair of neighbours of the same class, before scaling."""
    violations: float
    """Share of such neighbours in the data that the reference is fine-tuned on, 0 to 1."""
    pairs: int
    """Preference pairs to train on."""
    epochs: int
    batch_size: int = 16
    """Pairs a step."""
    learning_rate: float = 1e-3
    """Peak, of Adam without weight decay."""
    warmup_ratio: float = 0.05
    """Share of the steps with a rising learning rate; constant afterwards."""
    held_out_pairs: int = 1024
    stop: float = 0.3
    """Probability that the source ends a response after each token."""
    favourites: float = 1.0
    """Standard deviation of a prompt's log-preferences among the tokens of a class."""
    token_weights: float = 0.6
    """Standard deviation of the gold reward of one token, by prompt, before scaling."""
    sft_samples: int = 20_000
    sft_epochs: int = 4
    sft_batch_size: int = 128
    sft_learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        for name in ("violations", "stop", "warmup_ratio"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
        counts = ("pairs", "epochs", "batch_size", "held_out_pairs")
        for name in (*counts, "sft_samples", "sft_epochs", "sft_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def steps(self) -> int:
        """Optimiser steps of a whole alignment."""
        return self.epochs * -(-self.pairs // self.batch_size)


PRESETS = {
    # A rate of 1e-3 gives a shallower hump: DPO's gold is 0.2 at beta 0.005, not -0.2.
    "H": Preset("H", penalty=3.0, violations=0.02, pairs=2048, epochs=1, learning_rate=2e-3),
    "M": Preset("M", penalty=0.5, violations=0.03, pairs=1024, epochs=4),
}
"""H, harsh: what the data hardly show costs much. M, mild: a gentle fall, for the fits."""
GLIMPSE = "fast"
"""Name of the preset of ``--fast``: runs that are too few and too short to say anything."""


@dataclass(frozen=True)
class ModelSize:
    """Shape of a policy."""

    name: str
    hidden: int
    layers: int = 2
    heads: int = 2


_SIZES = (ModelSize("d12", 12), ModelSize("d32", 32), ModelSize("d64", 64))
SIZES = {size.name: size for size in _SIZES}


def preset_of(preset: str | Preset) -> Preset:
    """A preset by its name.

    Raises:
        ValueError: there is none of that name.
    """
    return preset if isinstance(preset, Preset) else _named("preset", preset, PRESETS)


def size_of(size: str | ModelSize) -> ModelSize:
    """A model size by its name.

    Raises:
        ValueError: there is none of that name.
    """
    return size if isinstance(size, ModelSize) else _named("size", size, SIZES)


def _named(kind: str, name: str, known: Mapping[str, Named]) -> Named:
    if name not in known:
        raise ValueError(f"{kind}: expected one of {', '.join(known)}, got {name!r}")
    return known[name]
