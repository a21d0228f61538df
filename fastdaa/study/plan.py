"""Which runs a study consists of, as data: presets x losses x betas x seeds x sizes."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastdaa.losses import Objective
from fastdaa.study.language import LANGUAGE, Language
from fastdaa.study.presets import ModelSize, Preset, preset_of, size_of
from fastdaa.validation import check_choice

BETAS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
SIZE_BETAS = (0.005, 0.05, 0.2, 1.0)
"""Betas at which the other model sizes are run."""
LOSSES = ("dpo", "ipo", "slic")
RDPO = "rdpo"
"""Length-regularised DPO (arXiv 2403.19159): ``dpo`` of this library with ``length_alpha``."""
LENGTH_ALPHA = 0.1
RECIPE = 1
"""Raised whenever a run's numbers would change under the same settings."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Raises:
        ValueError: a loss, hyperparameter or number that cannot be used.
    """

    preset: Preset
    loss: str
    beta: float
    seed: int
    size: ModelSize
    length_alpha: float = 0.0
    """R-DPO's alpha: log-odds a token that the chosen answer is longer; with ``rdpo`` only."""
    checkpoints: int = 5
    """Evenly spaced evaluations; the last one is at the end."""
    language: Language = LANGUAGE

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, (*LOSSES, RDPO))
        if (self.loss == RDPO) != (self.length_alpha != 0):
            raise ValueError(
                f"length_alpha: expected a value other than 0 with {RDPO!r} and with it only, got "
                f"{self.length_alpha} with {self.loss!r}"
            )
        if not 1 <= self.checkpoints <= self.preset.steps:
            raise ValueError(
                f"checkpoints: expected 1 to {self.preset.steps}, the steps of preset "
                f"{self.preset.name}, got {self.checkpoints}"
            )
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")
        self.objective()

    @property
    def id(self) -> str:
        """Name of the run and of its folder, such as ``H-dpo-b0.05-s0-d32``."""
        alpha = f"-a{self.length_alpha:g}" if self.length_alpha else ""
        parts = (self.preset.name, self.loss, f"b{self.beta:g}", f"s{self.seed}", self.size.name)
        return "-".join(parts) + alpha

    @property
    def loss_settings(self) -> tuple[str, dict[str, Any]]:
        """Loss and hyperparameters as :class:`~fastdaa.losses.Objective` and the trainer take them.

        IPO has its standard target 1 / (2 beta) on the summed log-ratio.
        """
        if self.loss == RDPO:
            return "dpo", {"beta": self.beta, "length_alpha": self.length_alpha}
        return self.loss, {"beta": self.beta}

    def objective(self) -> Objective:
        """The objective that is trained, and measured on held-out pairs."""
        loss, hyperparameters = self.loss_settings
        return Objective.parse(loss, **hyperparameters)

    @property
    def evaluated_steps(self) -> list[int]:
        """Optimiser steps after which the policy is measured, the last one included."""
        steps = self.preset.steps
        return [round(steps * place / self.checkpoints) for place in range(1, self.checkpoints + 1)]

    def settings(self) -> dict[str, Any]:
        """Everything that the run's numbers depend on, as JSON can hold it."""
        from fastdaa.study.sft import FORMAT

        versions = {"recipe": RECIPE, "reference": FORMAT}
        return {**versions, **json.loads(json.dumps(asdict(self)))}

    def fingerprint(self) -> str:
        """Hash of :meth:`settings`: two runs with the same one are the same run."""
        return hash_of(self.settings())


def grid(
    presets: Iterable[str | Preset] = ("H",),
    losses: Iterable[str] = LOSSES,
    betas: Iterable[float] = BETAS,
    seeds: Iterable[int] = (0,),
    sizes: Iterable[str | ModelSize] = ("d32",),
    length_alpha: float = LENGTH_ALPHA,
    checkpoints: int = 5,
    language: Language = LANGUAGE,
) -> list[Run]:
    """Every combination, runs that share a world next to each other.

    Args:
        presets: names in ``PRESETS``, or presets.
        losses: of ``LOSSES``, or ``rdpo``.
        length_alpha: of the ``rdpo`` runs.
        checkpoints: evaluations of each run.
        language: a smaller one makes everything faster, and its numbers others.

    Raises:
        ValueError: a name that does not exist, or a combination that cannot be run.
    """
    worlds = itertools.product(
        [preset_of(preset) for preset in presets],
        [size_of(size) for size in sizes],
        seeds,
    )
    ways = list(itertools.product(losses, betas))
    return unique(
        Run(
            preset=preset,
            loss=loss,
            beta=float(beta),
            seed=seed,
            size=size,
            length_alpha=length_alpha if loss == RDPO else 0.0,
            checkpoints=checkpoints,
            language=language,
        )
        for preset, size, seed in worlds
        for loss, beta in ways
    )


def full_study(seeds: Sequence[int] = (0, 1, 2)) -> list[Run]:
    """The runs of the whole study: both presets, model sizes, length-regularised DPO.

    Sizes and R-DPO are run in preset H, with the first two seeds.
    """
    few = tuple(seeds)[:2]
    return unique(
        [
            *grid(("H",), seeds=seeds),
            *grid(("M",), seeds=seeds),
            *grid(("H",), ("dpo",), SIZE_BETAS, few, ("d12", "d64")),
            *grid(("H",), (RDPO,), BETAS, few),
        ]
    )


def unique(runs: Iterable[Run]) -> list[Run]:
    """Each run once, in the order of their first mention.

    Raises:
        ValueError: two different runs of one name.
    """
    kept: dict[str, Run] = {}
    for run in runs:
        if kept.setdefault(run.id, run) != run:
            raise ValueError(f"runs: expected one way to run {run.id}, got two that differ")
    return list(kept.values())


def hash_of(settings: Mapping[str, Any]) -> str:
    """Sixteen digits that are the same for the same settings."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
