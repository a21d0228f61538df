"""Bootstrap: how far an estimate would move if other points, runs or seeds had been drawn.

A resample is a row of counts: how often each point was drawn. Points of the same cluster (a run,
a seed) are drawn together, because they are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_CONDITION_LIMIT = 1e10


def resample_counts(
    points: int, repeats: int, seed: int, clusters: Sequence[Any] | None = None
) -> np.ndarray:
    """Counts ``[repeats, points]``, fp64, drawn with replacement.

    Args:
        points: number of points.
        repeats: number of resamples.
        seed: of the random numbers.
        clusters: ``[points]`` labels of what is drawn as a whole; None draws single points.
    """
    generator = np.random.default_rng(seed)
    if clusters is None:
        member = np.arange(points)
    else:
        numbers = {label: number for number, label in enumerate(dict.fromkeys(clusters))}
        member = np.array([numbers[label] for label in clusters])
    drawn = int(member.max()) + 1
    counts = generator.multinomial(drawn, np.full(drawn, 1 / drawn), size=repeats)
    return counts[:, member].astype(np.float64)


def least_squares(design: np.ndarray, target: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ordinary least squares on every resample.

    Args:
        design: ``[n, p]`` of full rank. target: ``[n]``. counts: ``[repeats, n]``.

    Returns:
        Coefficients ``[repeats, p]``; NaN where a resample does not determine them.
    """
    # In an orthonormal basis of the columns the normal equations are as well posed as the resample.
    basis, triangle = np.linalg.qr(design)
    gram = np.einsum("bn,ni,nj->bij", counts, basis, basis, optimize=True)
    moment = np.einsum("bn,ni,n->bi", counts, basis, target, optimize=True)
    coefficients = np.full(moment.shape, np.nan)
    determined = np.linalg.cond(gram) < _CONDITION_LIMIT
    solved = np.linalg.solve(gram[determined], moment[determined][..., None])[..., 0]
    coefficients[determined] = np.linalg.solve(triangle, solved.T).T
    return coefficients


def interval(samples: np.ndarray, confidence: float) -> tuple[float, float] | None:
    """Percentile interval ``(low, high)`` of bootstrap samples; infinities keep their place.

    None where fewer than half of the samples are defined (not NaN).
    """
    defined = np.sort(samples[~np.isnan(samples)])
    if 2 * len(defined) < len(samples) or not len(defined):
        return None
    tail = (1 - confidence) / 2
    # Order statistics: interpolating between an infinity and a number would make NaN.
    last = len(defined) - 1
    return float(defined[int(np.floor(tail * last))]), float(
        defined[int(np.ceil((1 - tail) * last))]
    )


def correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson correlation of every resample, ``[repeats]``; NaN where x or y is constant.

    Args:
        x, y: ``[n]``, or ``[repeats, n]`` where they differ between resamples.
        counts: ``[repeats, n]``.
    """
    total = counts.sum(axis=1)

    def centred(v: np.ndarray) -> np.ndarray:
        return v - ((counts * v).sum(axis=1) / total)[:, None]

    a, b = centred(x), centred(y)
    scale_a, scale_b = (counts * a * a).sum(axis=1), (counts * b * b).sum(axis=1)
    # Rounding leaves a constant with a variance of about its square times the spacing of floats.
    tiny = (4 * np.finfo(np.float64).eps) ** 2
    constant = (scale_a <= tiny * (counts * x * x).sum(axis=1)) | (
        scale_b <= tiny * (counts * y * y).sum(axis=1)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        result = (counts * a * b).sum(axis=1) / np.sqrt(scale_a * scale_b)
    return np.where(constant, np.nan, np.clip(result, -1, 1))


def ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean rank of every point in every resample, ``[repeats, n]``; ties share their mean rank.

    Args:
        values: ``[n]``. counts: ``[repeats, n]``; a point drawn k times counts as k ties.
    """
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(place.max() + 1))
    tied = np.add.reduceat(counts[:, order], starts, axis=1)
    return (np.cumsum(tied, axis=1) - tied + (tied + 1) / 2)[:, place]


def rank_correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman correlation of every resample, ``[repeats]``; NaN where x or y is constant."""
    return correlation(ranks(x, counts), ranks(y, counts), counts)
