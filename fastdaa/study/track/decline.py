"""Over-optimisation as it happens: quality has fallen while KL has grown.

The rule, with the same prompts at all measurements: measurement ``c`` has declined if there is an
earlier ``b`` with

    mean(score_b - score_c) > z se(score_b - score_c)   and   mean(kl_c - kl_b) > z se(kl_c - kl_b)

where means and standard errors ``se = std / sqrt(n)`` are those of the ``n`` differences, prompt by
prompt, and ``z`` is the quantile of ``1 - 0.025 / m`` of Student's t with ``n - 1`` degrees of
freedom, for ``m`` earlier measurements (Bonferroni: the best of many noisy scores is above the
truth). So a run whose quality does not change warns at most once in forty measurements by chance,
however long it is (as far as means over the prompts are normal).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from fastdaa.counted import counted
from fastdaa.study.seed_noise import student_quantile

ERROR_RATE = 0.025
"""Chance of a warning at one measurement while nothing changes."""


class Measured(NamedTuple):
    """What the rule looks at, in the order of the prompts."""

    step: int
    scores: list[float]
    kl: list[float]
    """Rao-Blackwellised estimates, nats a sequence."""


class Decline(NamedTuple):
    """The earlier measurement from which the fall is largest."""

    step: int
    fall: float
    fall_stderr: float
    kl_growth: float
    """In nats a sequence."""
    kl_growth_stderr: float

    def __str__(self) -> str:
        return (
            f"since step {self.step} the score has fallen by {self.fall:.4g} "
            f"(standard error {self.fall_stderr:.2g}) while KL has grown by {self.kl_growth:.4g} "
            f"nats a sequence (standard error {self.kl_growth_stderr:.2g})"
        )


def decline(earlier: Sequence[Measured], current: Measured) -> Decline | None:
    """Apply the rule; measurements of one prompt cannot be judged and give None.

    Raises:
        ValueError: another number of prompts.
    """
    if not earlier or len(current.scores) < 2:
        return None
    z = student_quantile(1.0 - ERROR_RATE / len(earlier), len(current.scores) - 1)
    found = []
    for before in earlier:
        fall, fall_stderr = _difference(before.scores, current.scores)
        growth, growth_stderr = _difference(current.kl, before.kl)
        if fall > z * fall_stderr and growth > z * growth_stderr:
            found.append(Decline(before.step, fall, fall_stderr, growth, growth_stderr))
    return max(found, key=lambda one: one.fall, default=None)


def _difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of ``first - second``."""
    if len(first) != len(second):
        raise ValueError(f"expected values of {counted(len(first), 'prompt')}, got {len(second)}")
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    return fmean(gaps), stdev(gaps) / math.sqrt(len(gaps))
