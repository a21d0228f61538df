"""Every law on one set of points: coefficients, errors, intervals, peak. No tables in here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastdaa.study.bootstrap import interval, least_squares
from fastdaa.study.laws import LAWS, Law

_NAMES = ("alpha", "beta", "intercept")
NEAR = 2 / 3
"""Part of the points, the nearest ones, from which the others are predicted for ``far_rmse``."""


class Sample(NamedTuple):
    """The points of one group, and its resamples."""

    d: np.ndarray
    """``[n]`` distances of at least ``MIN_DISTANCE``, in sqrt(nats)."""
    gain: np.ndarray
    """``[n]`` scores over the reference's."""
    offset: float
    """The reference's score."""
    counts: np.ndarray
    """``[repeats, n]`` how often each resample drew each point."""
    confidence: float
    """Of the intervals."""
    labels: Sequence[Any] | None = None
    """``[n]`` what is left out as a whole (a run, a seed); None for single points."""


def fit_laws(sample: Sample, laws: Sequence[str]) -> list[dict[str, Any]]:
    """The list ``fits`` of :mod:`fastdaa.study.fit`, laws without intercept first."""
    fits, errors = [], []
    for intercept in (False, True):
        for name in laws:
            fit, loo_errors = _fit(LAWS[name], intercept, sample)
            fits.append(fit)
            errors.append(loo_errors**2)
    best = int(np.argmin([error.mean() for error in errors]))
    for place, (fit, error) in enumerate(zip(fits, errors, strict=True)):
        gaps = sample.counts @ (error - errors[best]) / sample.counts.sum(axis=1)
        ends = interval(gaps, sample.confidence)
        # The best has the least mean error, so only the lower end can come to lie below 0.
        fit["tied_with_best"] = place == best or (ends is not None and ends[0] <= 0)
    return fits


def _fit(law: Law, intercept: bool, sample: Sample) -> tuple[dict[str, Any], np.ndarray]:
    """One entry of ``fits`` and the leave-one-out errors ``[n]``."""
    gain = sample.gain
    design = law.design(sample.d, intercept)
    n, parameters = design.shape
    basis, triangle = np.linalg.qr(design)
    coefficients = np.linalg.solve(triangle, basis.T @ gain)
    residual = gain - design @ coefficients
    loo_errors = left_out_errors(basis, residual, sample.labels)

    samples = least_squares(design, gain, sample.counts)
    found = dict.fromkeys(_NAMES, 0.0)
    intervals: dict[str, list[float] | None] = dict.fromkeys(_NAMES)
    for place, name in enumerate(_NAMES[:parameters]):
        found[name] = float(coefficients[place]) + 0.0  # never -0
        ends = interval(samples[:, place] + 0.0, sample.confidence)
        intervals[name] = None if ends is None else list(ends)
    squares, spread = float(residual @ residual), float(((gain - gain.mean()) ** 2).sum())
    fit = {
        "law": law.name,
        "intercept": intercept,
        "formula": law.formula + (" + intercept" if intercept else ""),
        "coefficients": found,
        "intervals": intervals,
        "rmse": math.sqrt(squares / n),
        "loo_rmse": math.sqrt(float(np.mean(loo_errors**2))),
        "far_rmse": _far_rmse(design, sample),
        "aicc": _aicc(squares, n, parameters, float(gain @ gain)),
        "r2": 1 - squares / spread if spread > 0 else None,
        **_peak(law, found, samples, sample),
        **_zero_crossing(law, found, sample),
    }
    return fit, loo_errors


def left_out_errors(
    basis: np.ndarray, residual: np.ndarray, labels: Sequence[Any] | None = None
) -> np.ndarray:
    """Errors ``[n]`` of every point under the fit without it, or without all of its label.

    Least squares need no refit for that: ``(I - H)^-1 r``, with the block of the projection ``H``
    that belongs to what is left out.

    Args:
        basis: ``[n, p]``, orthonormal columns that span those of the design.
        residual: ``[n]`` of the fit to all points.
        labels: ``[n]``, see :class:`Sample`.
    """
    members = np.arange(len(residual))
    if labels is not None:
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        members = np.array([numbers[label] for label in labels])
    errors = np.empty_like(residual)
    for number in range(int(members.max()) + 1):
        block = members == number
        left, scale, _ = np.linalg.svd(basis[block], full_matrices=False)
        rest = 1 - scale**2
        # Where nothing is left, the others do not determine a coefficient, and the residual is 0.
        stretch = np.divide(scale**2, rest, out=np.zeros_like(rest), where=rest > 1e-10)
        errors[block] = residual[block] + left @ (stretch * (left.T @ residual[block]))
    return errors


def _far_rmse(design: np.ndarray, sample: Sample) -> float | None:
    """RMSE at the farthest third of the points of the law fitted to the others."""
    limit = np.quantile(sample.d, NEAR)
    near = sample.d <= limit
    parameters = design.shape[1]
    if near.all() or len(np.unique(sample.d[near])) <= parameters:
        return None
    coefficients = np.linalg.lstsq(design[near], sample.gain[near], rcond=None)[0]
    errors = sample.gain[~near] - design[~near] @ coefficients
    return math.sqrt(float(np.mean(errors**2)))


def _aicc(squares: float, n: int, parameters: int, scale: float) -> float | None:
    """Akaike's criterion with its small-sample term, up to a constant of the data."""
    k = parameters + 1  # the variance of the noise is a parameter too
    if n - k - 1 <= 0:
        return None
    # An exact fit would be minus infinity; rounding is the least error that can be told.
    least = np.finfo(np.float64).eps ** 2 * max(scale, 1e-200)
    return n * math.log(max(squares, least) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _peak(law: Law, found: dict[str, float], samples: np.ndarray, sample: Sample) -> dict[str, Any]:
    """``peak`` and ``peak_reason``; a peak outside the data would be an extrapolation."""
    low, high = float(sample.d.min()), float(sample.d.max())
    d = law.peak(found["alpha"], found["beta"])
    if d is None or not low <= d <= high:
        return {"peak": None, "peak_reason": _no_peak(d, found, low, high)}
    peaks = np.array([_peak_or_end(law, row) for row in samples])
    defined = ~np.isnan(peaks)
    ends = interval(peaks, sample.confidence) or (math.nan, math.nan)
    gain = float(law.value(d, **found))
    peak = {
        "d": d,
        "kl": d * d,
        "gain": gain,
        "score": gain + sample.offset,
        "d_interval": [end if low <= end <= high else None for end in ends],
        "share": float(((peaks >= low) & (peaks <= high)).sum() / max(defined.sum(), 1)),
        "points_beyond": int((sample.d > d).sum()),
    }
    return {"peak": peak, "peak_reason": None}


def _peak_or_end(law: Law, coefficients: np.ndarray) -> float:
    """The peak's d; infinity for a resample that never falls, 0 for one that never rises."""
    alpha, beta = float(coefficients[0]), float(coefficients[1])
    if math.isnan(alpha):
        return math.nan
    d = law.peak(alpha, beta)
    if d is None:
        return 0.0 if beta > 0 else math.inf
    return d


def _no_peak(d: float | None, found: dict[str, float], low: float, high: float) -> str:
    if d is not None and d > high:
        return (
            f"the fitted peak is at d = {d:.3g}, beyond the data (up to {high:.3g}), and would be "
            "an extrapolation"
        )
    if d is not None:
        return f"the fitted peak is at d = {d:.3g}, before the data (from {low:.3g})"
    if found["beta"] > 0:
        return "alpha is not positive: the fitted law falls from the start"
    return "beta is not positive: the fitted law has no maximum"


def _zero_crossing(law: Law, found: dict[str, float], sample: Sample) -> dict[str, Any]:
    """``zero_crossing``: where the gain is used up, if the data reach that far."""
    low, high = float(sample.d.min()), float(sample.d.max())
    d = law.zero_crossing(**found)
    if d is not None and low <= d <= high:
        return {"zero_crossing": d, "zero_crossing_reason": None}
    reason = "the fitted law does not come back to the reference's score"
    if d is not None:
        reason = f"it would be at d = {d:.3g}, outside the data ({low:.3g} to {high:.3g})"
    return {"zero_crossing": None, "zero_crossing_reason": reason}
