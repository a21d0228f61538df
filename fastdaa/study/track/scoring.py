"""What a scorer is: from samples to one number each. Reward models, functions and judges are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from fastdaa.counted import counted
from fastdaa.study.track.prompts import Prompt


class ScorerError(ValueError):
    """A scorer that cannot be set up, failed, took too long or answered nonsense."""


class Sample(NamedTuple):
    """A prompt, the policy's answer, and what is known of the answer."""

    prompt: Prompt
    answer: str
    tokens: int
    """Tokens of the answer, the one that ends it included."""
    finished: bool
    """False where the answer was cut at ``max_new_tokens``."""
    k1: float
    """Log-ratio of policy to reference, in nats."""
    rb: float
    """Exact divergences of the next-token distributions, summed over the answer, in nats."""
    entropy: float
    """The same sum of entropies, in nats."""


class Scores(NamedTuple):
    """What a scorer says."""

    values: list[float]
    """One for each sample, higher is better."""
    columns: dict[str, float]
    """More about all of them together, for the table."""


class Scorer(Protocol):
    """Scores samples."""

    column: str
    """``reward`` or ``win_rate``: the column of the table that holds the mean."""
    label: str
    """What scores, as the user named it."""

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """One value a sample.

        Raises:
            ScorerError: there are none.
        """


def finite_numbers(given: Any, count: int, where: str) -> list[float]:
    """``given`` as ``count`` finite floats.

    Raises:
        ScorerError: it is something else.
    """
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ScorerError(
            f"{where}: expected a list of {counted(count, 'number')}, got {type(given).__name__}"
        )
    if len(given) != count:
        raise ScorerError(f"{where}: expected {counted(count, 'number')}, got {len(given)}")
    values = []
    for place, value in enumerate(given):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ScorerError(f"{where}: expected finite numbers, got {value!r} at place {place}")
        values.append(number)
    return values
