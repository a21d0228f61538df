"""Which on-policy runs the comparison of APA, PPO and AWR consists of, as data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fastdaa.online.config import ALGORITHMS, OnlineConfig
from fastdaa.study.language import LANGUAGE, Language
from fastdaa.study.plan import hash_of
from fastdaa.study.presets import ModelSize, Preset, preset_of, size_of
from fastdaa.validation import check_choice

STRENGTHS: dict[str, tuple[float, ...]] = {
    "apa": (0.05, 0.1, 0.2, 0.5, 1.0),
    "ppo": (0.0, 0.05, 0.1, 0.2, 0.5),
    "awr": (0.2, 0.5, 1.0, 2.0),
}
"""Lambda of APA and AWR, coefficient of PPO's KL cost; in deviations of the proxy reward."""
WHITENED_APA = (0.2, 1.0)
"""Lambdas at which APA is also run with whitened advantages, as the authors' code has them."""
EXACT_STRENGTHS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Lambdas of APA's fixed points, and weights of the KL term of the exact optima."""
RECIPE = 1
"""Raised whenever a run's numbers would change under the same settings."""


@dataclass(frozen=True)
class OnlineRun:
    """One on-policy run.

    Raises:
        ValueError: a number or algorithm that cannot be used.
    """

    preset: Preset
    algorithm: str
    strength: float
    """Lambda of APA and AWR, KL coefficient of PPO."""
    seed: int
    size: ModelSize
    whitened: bool = False
    """Masked whitening of advantages over each minibatch; PPO always has it."""
    iterations: int = 40
    evaluate_every: int = 4
    """Iterations between two exact evaluations; the last iteration is always evaluated."""
    rollouts: int = 128
    minibatch: int = 32
    epochs: int = 2
    learning_rate: float = 1e-3
    language: Language = LANGUAGE

    def __post_init__(self) -> None:
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every: expected at least 1, got {self.evaluate_every}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")
        self.config()

    @property
    def id(self) -> str:
        """Name of the run and of its folder, such as ``H-apa-l0.5-s0-d32``."""
        letter = "k" if self.algorithm == "ppo" else "l"
        setting = f"{letter}{self.strength:g}" + ("-white" if self.whitened else "")
        return f"{self.preset.name}-{self.algorithm}-{setting}-s{self.seed}-{self.size.name}"

    @property
    def series(self) -> str:
        """``apa``, ``ppo``, ``awr``, or ``apa-whitened``."""
        return f"{self.algorithm}-whitened" if self.whitened else self.algorithm

    def config(self) -> OnlineConfig:
        """The settings of the loop; nothing is written."""
        strength = {"kl_coef" if self.algorithm == "ppo" else "kl_lambda": self.strength}
        return OnlineConfig(
            output_dir=None,
            algorithm=self.algorithm,  # type: ignore[arg-type]
            iterations=self.iterations,
            rollouts_per_iteration=self.rollouts,
            minibatch=self.minibatch,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            adam_beta2=0.999,
            whiten_advantages="masked" if self.whitened else "auto",
            critic_head="linear",
            # The proxy has unit deviation already.
            reward_scaling="none",
            max_new_tokens=self.language.longest,
            # Segments of a few tokens: the kernel that cuts long ones up costs more than it saves.
            attention="sdpa_loop",
            seed=self.seed,
            disable_tqdm=True,
            **strength,  # type: ignore[arg-type]
        )

    def settings(self) -> dict[str, Any]:
        """Everything that the run's numbers depend on, as JSON can hold it."""
        return {"recipe": RECIPE, **json.loads(json.dumps(asdict(self)))}

    def fingerprint(self) -> str:
        """Hash of :meth:`settings`: two runs with the same one are the same run."""
        return hash_of(self.settings())


@dataclass(frozen=True)
class ExactRun:
    """What the runs of one world could reach, without training: two families of policies."""

    preset: Preset
    size: ModelSize
    seed: int
    language: Language = LANGUAGE

    @property
    def id(self) -> str:
        """Such as ``H-exact-s0-d32``."""
        return f"{self.preset.name}-exact-s{self.seed}-{self.size.name}"

    def settings(self) -> dict[str, Any]:
        """As those of :class:`OnlineRun`."""
        given = {"recipe": RECIPE, "strengths": list(EXACT_STRENGTHS)}
        return {**given, **json.loads(json.dumps(asdict(self)))}

    def fingerprint(self) -> str:
        """As that of :class:`OnlineRun`."""
        return hash_of(self.settings())


def online_grid(
    algorithms: Iterable[str] = ALGORITHMS,
    seeds: Iterable[int] = (0, 1, 2),
    *,
    preset: str | Preset = "H",
    size: str | ModelSize = "d32",
    strengths: dict[str, tuple[float, ...]] | None = None,
    whitened: tuple[float, ...] = WHITENED_APA,
    **settings: Any,
) -> list[OnlineRun]:
    """Every setting of every algorithm in every seed, seeds together: they share a world.

    What is asked for twice is there once.

    Args:
        strengths: by algorithm; default: ``STRENGTHS``.
        whitened: lambdas of whitened APA, where ``apa`` is among the algorithms.
        settings: other fields of :class:`OnlineRun`.
    """
    chosen = STRENGTHS if strengths is None else strengths
    preset, size, algorithms = preset_of(preset), size_of(size), list(algorithms)
    for algorithm in algorithms:
        check_choice("algorithms", algorithm, ALGORITHMS)
    ways = [(name, float(value), False) for name in algorithms for value in chosen[name]]
    if "apa" in algorithms:
        ways += [("apa", float(value), True) for value in whitened]
    runs = [
        OnlineRun(preset, name, value, seed, size, whitened=white, **settings)
        for seed in seeds
        for name, value, white in ways
    ]
    return list(dict.fromkeys(runs))
