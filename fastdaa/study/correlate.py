"""What goes with quality, and what does not: correlations over a table; ``correlations.json``.

``correlations.json`` is one object; a correlation that is not defined is null, with its reason::

    {"settings": {every field of CorrelateSettings},
     "digest": "0f3a...",                       # of the rows, by Table.digest
     "quality": [
       {"x": "accuracy", "y": "score",          # x: accuracy, loss_value, margin
        "scope": "loss",                        # pooled | loss | size | loss and size
        "group": {"loss": "dpo"},               # the values of the scope's columns
        "n": 120, "runs": 24, "reason": null,
        "pearson": -0.02, "pearson_interval": [-0.2, 0.15],
        "spearman": 0.01, "spearman_interval": [-0.2, 0.2]}],
     "length": [                                # R^2 of the log-ratio on the length
       {"column": "length_r2_samples",          # or length_r2_pairs
        "size": "d12" or null, "kl_range": [0.0, 0.4] or null,   # null: every KL
        "n": 40, "mean": 0.3, "least": 0.1, "greatest": 0.6}],
     "length_trend": [                          # does R^2 grow with KL, within a size?
       {"column", "size", ... as in "quality", with x = "kl", y = the column}],
     "likelihood": [                            # chosen log-ratio against forward KL
       {"group": {"loss": "dpo"}, "n": 120,
        "chosen_below_zero": 0.9,               # share of rows with a negative chosen log-ratio
        "rejected_below_zero": 0.95 or null,
        "slope": -0.8, "intercept": 0.1,        # chosen_logratio = slope * kl_forward + intercept
        "gap": 0.3,                             # mean of chosen_logratio + kl_forward, nats
        "pearson": -0.97, "pearson_interval": [...], "spearman", "spearman_interval", "reason"}],
     "summary": ["plain sentences"]}

Intervals are percentile intervals of a bootstrap that draws whole runs: checkpoints of one run are
not independent. With fewer than five runs an interval is null. Rows without one of the two columns
are left out of a correlation, so ``n`` differs between entries. IPO's held-out loss of the small
world is taken times ``4 beta^2``, see :func:`fastdaa.study.curves.comparable_loss`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastdaa.study.bootstrap import correlation, interval, rank_correlation, resample_counts
from fastdaa.study.correlate_words import describe_correlations
from fastdaa.study.curves import comparable_loss
from fastdaa.study.table import Table

PREDICTORS = ("accuracy", "loss_value", "margin")
LENGTH_COLUMNS = ("length_r2_samples", "length_r2_pairs")
_MIN_POINTS = 4
_MIN_RUNS = 5


@dataclass(frozen=True)
class CorrelateSettings:
    """What is correlated. Raises ``ValueError`` for values out of range."""

    score: str = "score"
    """Column of the quality."""
    final_only: bool = False
    """Only the last checkpoint of each run."""
    budgets: tuple[float, ...] | None = None
    """Ends of the KL ranges of ``length``, in nats; None for the thirds of the rows."""
    repeats: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 100:
            raise ValueError(
                f"repeats (--bootstrap): expected at least 100 resamples, got {self.repeats}"
            )
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence: expected a number in (0, 1), got {self.confidence}")
        ends = self.budgets
        if ends is not None and (not ends or list(ends) != sorted(set(ends)) or ends[0] <= 0):
            raise ValueError(f"budgets: expected rising KLs above 0, got {list(ends)}")


def correlate_table(table: Table, settings: CorrelateSettings | None = None) -> dict[str, Any]:
    """The content of ``correlations.json``.

    Raises:
        ValueError: an empty table, or one without the score or anything to hold against it.
    """
    settings = settings or CorrelateSettings()
    table.check_score("correlate", settings.score)
    wanted = (*PREDICTORS, *LENGTH_COLUMNS, "chosen_logratio")
    if not set(wanted) & set(table.columns):
        raise ValueError(
            f"correlate: expected at least one of the columns {', '.join(wanted)}, "
            f"got {', '.join(table.columns)}"
        )
    rows = table.final() if settings.final_only else table
    rows = Table(dict(comparable_loss(row)) for row in rows)
    content = {
        "settings": asdict(settings),
        "digest": table.digest(settings.score),
        "quality": _quality(rows, settings),
        "length": _length(rows, settings),
        "length_trend": [
            {"column": column, "size": size, **_correlate(part, "kl", column, settings)}
            for column in LENGTH_COLUMNS
            if column in rows.columns
            for size, part in _sizes(rows)
        ],
        "likelihood": _likelihood(rows, settings),
    }
    return content | {"summary": describe_correlations(content)}


def _quality(table: Table, settings: CorrelateSettings) -> list[dict[str, Any]]:
    scopes: list[tuple[str, tuple[str, ...]]] = [("pooled", ())]
    several = [name for name in ("loss", "size") if len(_labels(table, name)) > 1]
    scopes += [(name, (name,)) for name in several]
    if len(several) == 2:
        scopes.append(("loss and size", ("loss", "size")))
    entries = []
    for predictor in PREDICTORS:
        if predictor not in table.columns:
            continue
        for scope, columns in scopes:
            for key, rows in table.by(*columns).items():
                entries.append(
                    {"scope": scope, "group": dict(zip(columns, key, strict=True))}
                    | _correlate(rows, predictor, settings.score, settings)
                )
    return entries


def _correlate(table: Table, x: str, y: str, settings: CorrelateSettings) -> dict[str, Any]:
    """Both correlations of two columns, with intervals or the reason why there are none."""
    rows = table.known(x, y)
    entry: dict[str, Any] = {
        "x": x,
        "y": y,
        "n": len(rows),
        "runs": len({row["run"] for row in rows}),
        "reason": None,
        "pearson": None,
        "pearson_interval": None,
        "spearman": None,
        "spearman_interval": None,
    }
    if len(rows) < _MIN_POINTS:
        entry["reason"] = f"expected at least {_MIN_POINTS} rows with both, got {len(rows)}"
        return entry
    a, b = rows.numbers(x), rows.numbers(y)
    whole = np.ones((1, len(rows)))
    if np.isnan(correlation(a, b, whole)[0]):
        constant = x if np.ptp(a) <= np.ptp(b) else y
        entry["reason"] = f"{constant} is the same in all rows"
        return entry
    counts = resample_counts(
        len(rows), settings.repeats, settings.seed, [row["run"] for row in rows]
    )
    for name, function in (("pearson", correlation), ("spearman", rank_correlation)):
        entry[name] = float(function(a, b, whole)[0])
        if entry["runs"] < _MIN_RUNS:
            continue  # one run drawn again and again would look certain
        ends = interval(function(a, b, counts), settings.confidence)
        entry[f"{name}_interval"] = None if ends is None else list(ends)
    return entry


def _length(table: Table, settings: CorrelateSettings) -> list[dict[str, Any]]:
    """R^2 of the log-ratio on the length by size and KL budget."""
    entries = []
    for column in LENGTH_COLUMNS:
        known = table.known(column)
        if not len(known):
            continue
        ranges = _kl_ranges(known, settings.budgets)
        for size, rows in _sizes(known):
            for kl_range in (None, *ranges):
                inside = rows.numbers("kl").clip(min=0)
                values = rows.numbers(column)
                if kl_range is not None:
                    values = values[(inside >= kl_range[0]) & (inside < kl_range[1])]
                if not len(values):
                    continue
                entries.append(
                    {
                        "column": column,
                        "size": size,
                        "kl_range": None if kl_range is None else list(kl_range),
                        "n": len(values),
                        "mean": float(values.mean()),
                        "least": float(values.min()),
                        "greatest": float(values.max()),
                    }
                )
    return entries


def _kl_ranges(table: Table, budgets: Sequence[float] | None) -> list[tuple[float, float]]:
    """Half-open ranges that hold every row; the last one ends just above the largest KL."""
    kl = table.numbers("kl").clip(min=0)
    inner = np.quantile(kl, [1 / 3, 2 / 3]) if budgets is None else np.array(budgets)
    end = float(np.nextafter(kl.max(), np.inf))
    ends = [0.0, *(float(value) for value in np.unique(inner) if 0 < value < end), end]
    return list(itertools.pairwise(ends))


def _likelihood(table: Table, settings: CorrelateSettings) -> list[dict[str, Any]]:
    known = table.known("chosen_logratio", "kl_forward")
    if not len(known):
        return []
    parts: list[tuple[dict[str, Any], Table]] = [({}, known)]
    if len(_labels(known, "loss")) > 1:
        parts += [({"loss": loss}, rows) for (loss,), rows in known.by("loss").items()]
    entries = []
    for group, rows in parts:
        chosen, forward = rows.numbers("chosen_logratio"), rows.numbers("kl_forward")
        rejected = rows.numbers("rejected_logratio")
        rejected = rejected[~np.isnan(rejected)]
        entry = _correlate(rows, "kl_forward", "chosen_logratio", settings)
        slope = intercept = None
        if entry["pearson"] is not None:
            slope, intercept = (float(value) for value in np.polyfit(forward, chosen, 1))
        entries.append(
            {
                "group": group,
                **entry,
                "chosen_below_zero": float((chosen < 0).mean()),
                "rejected_below_zero": float((rejected < 0).mean()) if len(rejected) else None,
                "slope": slope,
                "intercept": intercept,
                "gap": float((chosen + forward).mean()),
            }
        )
    return entries


def _sizes(table: Table) -> list[tuple[Any, Table]]:
    if "size" not in table.columns:
        return [(None, table)]
    return [(size, rows) for (size,), rows in table.by("size").items()]


def _labels(table: Table, column: str) -> set[Any]:
    return {row.get(column) for row in table}
