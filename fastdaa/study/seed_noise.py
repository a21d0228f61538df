"""What a few seeds can tell: the interval of their mean, by Student's t.

Two standard errors are 95 % of a normal distribution, but the standard error of three seeds is
itself an estimate: the same interval takes 4.3 of them, and 12.7 with two seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, stdev

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
    """The ``p`` quantile of Student's t, for ``p`` of 0.5 to 0.99, within 0.5 %.

    Exact for 1 and 2 degrees of freedom, else the expansion around the normal quantile
    (Abramowitz and Stegun, 26.7.5).
    """
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
