"""Laws of quality against distance, fitted to each group of a table; written to ``fits.json``.

``fits.json`` is one object; numbers are null where they are unknown or not supported by the data,
and a reason stands beside every null that could be taken for a result::

    {"settings": {every field of FitSettings},
     "digest": "0f3a...",                           # of the rows, by Table.digest
     "points": rows used in all groups, "dropped": rows closer than MIN_DISTANCE,
     "unknown": rows without the score,
     "groups": [
       {"group": {"loss": "dpo", "seed": 0},        # {} for one pooled group
        "points": 40, "dropped": 1, "unknown": 0, "runs": 8, "seeds": [0],
        "d_range": [0.1, 2.1],                      # sqrt(nats), of the points used
        "offset": 0.0,                              # score of the reference, taken off first
        "resampled": "runs",                        # what the bootstrap draws, and loo leaves out
        "observed_peak": {"d", "kl", "score", "gain", "run", "checkpoint"},    # the best row
        "message": null,                            # or why there is no fit
        "notes": ["..."],
        "best": 4,                                  # place in "fits" of the least loo_rmse
        "fits": [
          {"law": "log", "intercept": false, "formula": "d (alpha - beta log d)",
           "coefficients": {"alpha": 1.2, "beta": 0.8, "intercept": 0.0},
           "intervals": {"alpha": [1.1, 1.3], "beta": [0.7, 0.9], "intercept": null},
           "rmse": 0.12, "loo_rmse": 0.13, "far_rmse": 0.3 or null, "aicc": -160.0, "r2": 0.7,
           "tied_with_best": true,     # leave-one-out errors cannot be told from the best fit's
           "peak": {"d", "kl", "gain", "score", "d_interval": [1.0, null], "share": 0.97,
                    "points_beyond": 12} or null,
           "peak_reason": null or "...",
           "zero_crossing": 2.0 or null, "zero_crossing_reason": null or "..."}]}],
     "summary": ["plain sentences"]}

``gain`` is ``score - offset``; coefficients, intervals and errors are in units of the score.
``loo_rmse`` is the error of each point under the fit without its unit (point, run or seed, as
``resampled`` says); ``far_rmse`` that of the farthest third of the points under the fit to the
others, null where these have too few distances. ``r2`` compares with the mean of the gains, whether
or not the law has an intercept. ``share`` is the part of the bootstrap's resamples whose peak lies
inside ``d_range``; an end of ``d_interval`` that lies outside is null.
:meth:`fastdaa.study.laws.Law.value` turns coefficients into a curve, and
:mod:`fastdaa.study.fit_rows` all fits into a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastdaa.study.bootstrap import resample_counts
from fastdaa.study.curves import distance
from fastdaa.study.fit_words import describe_fits
from fastdaa.study.law_fits import Sample, fit_laws
from fastdaa.study.laws import LAWS, MIN_DISTANCE
from fastdaa.study.table import Table
from fastdaa.validation import check_choice

_MIN_POINTS = 6
_FEW_UNITS = 5
SETTINGS_OF_A_CURVE = ("preset", "size", "algorithm", "whitened", "loss", "length_alpha", "seed")
"""Rows that differ in one of these are not on the same curve; beta and progress move along it."""


@dataclass(frozen=True)
class FitSettings:
    """What is fitted. Raises ``ValueError`` for values out of range."""

    score: str = "score"
    """Column of the quality."""
    offset: float | None = None
    """The reference's score; None for 0 (``gold``), else the mean score of the group's rows at the
    reference itself, or where it has none 0.5 (``win_rate``) or 0."""
    group: tuple[str, ...] | None = None
    """Columns whose values make the groups; empty for one pooled fit, None for those of
    :data:`SETTINGS_OF_A_CURVE` that vary in the table."""
    final_only: bool = False
    """Only the last checkpoint of each run."""
    laws: tuple[str, ...] = tuple(LAWS)
    repeats: int = 1000
    """Resamples of the bootstrap."""
    confidence: float = 0.95
    resample: str = "auto"
    """What is drawn: ``"points"``, ``"runs"``, ``"seeds"``, or ``"auto"``: seeds where a group has
    three or more of them, else runs where it has five or more, else points."""
    seed: int = 0
    """Of the bootstrap's random numbers."""

    def __post_init__(self) -> None:
        check_choice("resample", self.resample, ("auto", "points", "runs", "seeds"))
        for law in self.laws:
            check_choice("laws", law, LAWS)
        if not self.laws:
            raise ValueError(f"laws: expected at least one of {', '.join(LAWS)}, got none")
        if self.repeats < 100:
            raise ValueError(
                f"repeats (--bootstrap): expected at least 100 resamples, got {self.repeats}"
            )
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence: expected a number in (0, 1), got {self.confidence}")
        if self.offset is not None and not math.isfinite(self.offset):
            raise ValueError(f"offset: expected a finite number, got {self.offset}")


def fit_table(table: Table, settings: FitSettings | None = None) -> dict[str, Any]:
    """Fit every law, with and without intercept, to every group; the content of ``fits.json``.

    Raises:
        ValueError: an empty table, a column that is missing or holds no numbers.
    """
    settings = settings or FitSettings()
    table.check_score("fit", settings.score)
    columns = default_group(table) if settings.group is None else settings.group
    groups = [
        {"group": dict(zip(columns, key, strict=True)), **fit_group(rows, settings)}
        for key, rows in table.by(*columns).items()
    ]
    totals = {name: sum(group[name] for group in groups) for name in ("points", "dropped")}
    content = {
        "settings": asdict(settings) | {"group": columns},
        "digest": table.digest(settings.score),
        **totals,
        "unknown": sum(group["unknown"] for group in groups),
        "groups": groups,
    }
    return content | {"summary": describe_fits(content)}


def default_group(table: Table) -> tuple[str, ...]:
    """The columns of :data:`SETTINGS_OF_A_CURVE` that have more than one value.

    ``whitened`` only where it tells runs of one algorithm apart.
    """
    varying = [name for name in SETTINGS_OF_A_CURVE if len({row.get(name) for row in table}) > 1]
    pairs = {(row.get("algorithm"), row.get("whitened")) for row in table}
    if "whitened" in varying and len(pairs) == len({algorithm for algorithm, _ in pairs}):
        varying.remove("whitened")
    return tuple(varying)


def fit_group(table: Table, settings: FitSettings) -> dict[str, Any]:
    """One entry of ``groups``, without its ``group``."""
    known = table.known("kl", settings.score)
    offset, notes = _offset(known, settings)
    # A run whose last score is not known has none; an earlier one is not its last.
    chosen = table.final().known("kl", settings.score) if settings.final_only else known
    used = chosen.where(lambda row: distance(row) >= MIN_DISTANCE)
    d = np.array([distance(row) for row in used])
    gain = used.numbers(settings.score) - offset
    seeds = sorted({row["seed"] for row in used if row.get("seed") is not None})
    unit = _resample_unit(used, seeds, settings)
    result: dict[str, Any] = {
        "points": len(used),
        "dropped": len(chosen) - len(used),
        "unknown": len(table) - len(known),
        "runs": len({row["run"] for row in used}),
        "seeds": seeds,
        "d_range": [float(d.min()), float(d.max())] if len(d) else None,
        "offset": offset,
        "resampled": unit,
        "observed_peak": _observed_peak(used, d, gain, settings.score),
        "message": _too_little(d),
        "notes": notes,
        "best": None,
        "fits": [],
    }
    if result["message"] is None:
        column = {"points": None, "runs": "run", "seeds": "seed"}[unit]
        labels = None if column is None else [row.get(column) for row in used]
        notes += _resample_notes(unit, labels, result)
        counts = resample_counts(len(used), settings.repeats, settings.seed, labels)
        sample = Sample(d, gain, offset, counts, settings.confidence, labels)
        result["fits"] = fit_laws(sample, settings.laws)
        result["best"] = min(
            range(len(result["fits"])), key=lambda place: result["fits"][place]["loo_rmse"]
        )
    return result


def _offset(table: Table, settings: FitSettings) -> tuple[float, list[str]]:
    """The reference's score, and what has to be said about it."""
    if settings.offset is not None:
        return settings.offset, []
    if _is_score(table, settings.score, "gold"):
        return 0.0, []
    # Not below: an estimate of a KL can be negative anywhere near the reference.
    at_reference = table.where(lambda row: abs(row["kl"]) < MIN_DISTANCE**2)
    if len(at_reference):
        offset = float(at_reference.numbers(settings.score).mean())
        return offset, [f"the reference's score is {offset:.4g}, of rows with KL below 1e-6"]
    start = "no row at KL = 0 says what the reference scores"
    if _is_score(table, settings.score, "win_rate"):
        return 0.5, [
            f"{start}, and 0.5, its win rate against itself, is taken off: give an offset if the "
            "answers were compared with others"
        ]
    return 0.0, [f"{start}, and 0 is taken: give an offset, or trust only the fits with intercept"]


def _is_score(table: Table, score: str, column: str) -> bool:
    """Whether what is fitted is a known column, or ``score`` holds the same numbers."""
    same = score == "score" and len(table) and all(r.get(column) == r["score"] for r in table)
    return score == column or bool(same)


def _resample_unit(table: Table, seeds: list[Any], settings: FitSettings) -> str:
    if settings.resample == "seeds" and any(row.get("seed") is None for row in table):
        raise ValueError("resample: expected a seed in every row, got rows without one")
    if settings.resample != "auto":
        return settings.resample
    if len(seeds) >= 3 and all(row.get("seed") is not None for row in table):
        return "seeds"
    return "runs" if len({row["run"] for row in table}) >= _FEW_UNITS else "points"


def _resample_notes(unit: str, labels: list[Any] | None, group: Mapping[str, Any]) -> Iterator[str]:
    """What has to be said about intervals from few units.

    Raises:
        ValueError: a single unit; every resample of it would be the same.
    """
    if labels is None:
        if group["runs"] < group["points"]:
            yield (
                f"checkpoints of a run are not independent, and fewer than {_FEW_UNITS} runs "
                "cannot be resampled: intervals over points are too short"
            )
        return
    units = len(set(labels))
    if units < 2:
        raise ValueError(
            f"resample: expected two or more {unit} in a group, got 1; pool some with --group, or "
            "resample points"
        )
    if units < _FEW_UNITS:
        yield f"only {units} {unit} to resample: intervals are rough, and as a rule too short"


def _observed_peak(
    table: Table, d: np.ndarray, gain: np.ndarray, score: str
) -> dict[str, Any] | None:
    if not len(table):
        return None
    place = int(np.argmax(gain))
    row = table[place]
    return {
        "d": float(d[place]),
        "kl": row["kl"],
        "score": float(row[score]),
        "gain": float(gain[place]),
        "run": row["run"],
        "checkpoint": row["checkpoint"],
    }


def _too_little(d: np.ndarray) -> str | None:
    """Why these points cannot be fitted, or None."""
    if len(d) < _MIN_POINTS:
        return f"expected at least {_MIN_POINTS} points away from the reference, got {len(d)}"
    distinct = len(np.unique(d))
    if distinct < 4:
        return f"expected points at 4 or more different distances, got {distinct}"
    return None
