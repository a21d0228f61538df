"""Is the new version slower than the base? A ratio of times with its confidence interval.

Both versions run in turns, so each round is a pair of times that met the same machine; its log
ratio is free of whatever both share. The estimate is the median over all rounds. A process has a
speed of its own (where its memory lies, what its threads got), which no number of rounds averages
away: both versions are therefore launched several times, and the interval comes from a bootstrap
that draws launches first and rounds within them second (Kalibera and Jones, "Rigorous Benchmarking
in Reasonable Time", ISMM 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.99
_DRAWS = 2000


class Ratio(NamedTuple):
    """New time over base time; above 1 is slower."""

    value: float
    low: float
    high: float

    def verdict(self, threshold: float) -> str:
        """``slower`` or ``faster`` if certain and by more than ``threshold``, else ``same``."""
        if self.low > 1.0 and self.value >= 1.0 + threshold:
            return "slower"
        if self.high < 1.0 and self.value <= 1.0 / (1.0 + threshold):
            return "faster"
        return "same"


def ratio_of(
    base: Sequence[Sequence[float]], new: Sequence[Sequence[float]], seed: int = 0
) -> Ratio:
    """The ratio from seconds ``base[launch][round]`` and ``new[launch][round]``.

    Raises:
        ValueError: without a round, or if the two differ in their rounds.
    """
    if [len(rounds) for rounds in base] != [len(rounds) for rounds in new]:
        raise ValueError("expected as many rounds of the base as of the new version")
    pairs = zip(base, new, strict=True)
    logs = [np.log(np.divide(late, early)) for early, late in pairs if len(early)]
    if not logs:
        raise ValueError("expected at least one round, got none")
    draws = _draw(logs, np.random.default_rng(seed))
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    value = float(np.median(np.concatenate(logs)))
    # A discrete bootstrap may leave its own centre out.
    return Ratio(
        float(np.exp(value)), float(np.exp(min(low, value))), float(np.exp(max(high, value)))
    )


def _draw(logs: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Medians of resampled launches with resampled rounds, ``[_DRAWS]``."""
    counts = np.array([len(rounds) for rounds in logs])
    # An interrupted launch has fewer rounds: the rest of its line is no number.
    table = np.full((len(logs), counts.max()), np.nan)
    for line, rounds in zip(table, logs, strict=True):
        line[: len(rounds)] = rounds
    launches = generator.integers(len(logs), size=(_DRAWS, len(logs), 1))
    places = generator.random((_DRAWS, len(logs), counts.max())) * counts[launches]
    drawn = table[launches, places.astype(int)]
    drawn[np.arange(counts.max()) >= counts[launches]] = np.nan
    medians: np.ndarray = np.nanmedian(drawn.reshape(_DRAWS, -1), axis=1)
    return medians
