"""What a few seeds can tell: the interval of their mean, by Student's t.

Two standard errors are 95 % of a normal distribution, but the standard error of three seeds is
itself an estimate: the same interval takes 4.3 of them, and 12.7 with two seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

CONFIDENCE = 0.95


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None for fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def margin(stderr: float | None, seeds: int) -> float:
    """Half the width of the 95 % interval of a mean over seeds; 0 for a single seed.

    Args:
        stderr: standard error of the mean; None where there is one seed.
        seeds: that the mean is over.
    """
    if stderr is None or seeds < 2:
        return 0.0
    return student_quantile(0.5 + CONFIDENCE / 2, seeds - 1) * stderr


def student_quantile(p: float, freedom: int) -> float:
    """The ``p`` quantile of Student's t with ``freedom`` of at least 1, for ``p`` of 0.5 to 1."""
    wanted = 2 * p - 1
    low, high = 0.0, 1.0
    while _probability_within(high, freedom) < wanted:
        low, high = high, 2 * high
    while low < (middle := 0.5 * (low + high)) < high:
        if _probability_within(middle, freedom) < wanted:
            low = middle
        else:
            high = middle
    return high


def _probability_within(t: float, freedom: int) -> float:
    """Of -t to t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    angle = math.atan2(t, math.sqrt(freedom))
    cosine = math.cos(angle)
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for divisor in range(2 + odd, freedom - 1, 2):
        term *= (divisor - 1) / divisor * cosine * cosine
        total += term
    inside = math.sin(angle) * total
    return 2 / math.pi * (angle + inside) if odd else inside
