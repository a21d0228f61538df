"""From rows of checkpoints to the curves that figures draw and claims judge.

A row is a mapping with the columns of :mod:`fastdaa.study.table`; KL is in nats a sequence, and
distances are its square root, in square roots of nats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from fastdaa.study.seed_noise import margin, standard_error

Row = Mapping[str, Any]
AnyRow = TypeVar("AnyRow", bound=Row)
LOSS_ORDER = ("dpo", "ipo", "slic")
LOSS_NAMES = {
    "dpo": "DPO", "ipo": "IPO", "slic": "SLiC", "hinge": "SLiC", "rdpo": "R-DPO",
    "apa": "APA", "awr": "AWR", "ppo": "PPO",
}  # fmt: skip
"""Of losses and of on-policy algorithms, as the papers write them."""
EXACT_POLICIES = ("apa_fixed_point", "kl_optimum")
"""Algorithms of rows of ``fastdaa study online`` that were computed, not trained."""


class Point(NamedTuple):
    """Seeds of one setting (one beta), averaged."""

    beta: float | None
    distance: float
    score: float
    stderr: float | None
    """Of the mean score over seeds; None with one seed."""
    rows: tuple[Row, ...]


def distance(row: Row) -> float:
    """``sqrt(KL)`` of a row; an estimate below zero counts as zero."""
    return math.sqrt(max(float(row["kl"]), 0.0))


def score_error(row: Row) -> float | None:
    """Standard error of a row's score, where its table has one."""
    return _known(row, "score_stderr")


def kl_error(row: Row) -> float | None:
    """Standard error of a row's KL, in nats: that of the estimator that ``kl`` is."""
    for estimate in ("kl_rb", "kl_k1"):
        if row.get(estimate) is not None and row[estimate] == row["kl"]:
            return _known(row, f"{estimate}_stderr")
    return _known(row, "kl_stderr")


def distance_errors(row: Row) -> tuple[float, float] | None:
    """From ``sqrt(KL)`` down and up to that of a KL one standard error away."""
    error = kl_error(row)
    if error is None:
        return None
    low, high = max(row["kl"] - error, 0.0), max(row["kl"] + error, 0.0)
    return distance(row) - math.sqrt(low), math.sqrt(high) - distance(row)


def _known(row: Row, column: str) -> float | None:
    value = row.get(column)
    return None if value is None else float(value)


def series_name(row: Row) -> str:
    """What a row's curve is called: its loss, else its algorithm, else ``all runs``.

    APA and AWR with whitened advantages are another method: their anchor moves with the spread.
    """
    loss = row.get("loss") or row.get("algorithm")
    if not loss:
        return "all runs"
    name = LOSS_NAMES.get(str(loss).lower(), str(loss))
    return f"whitened {name}" if row.get("whitened") and name in ("APA", "AWR") else name


def distinct(rows: Iterable[Row], column: str) -> list[Any]:
    """Sorted values of a column, None left out."""
    found = {row[column] for row in rows if row.get(column) is not None}
    return sorted(found, key=lambda value: (isinstance(value, str), value))


def split(rows: Iterable[Row], key: str | Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a column or a function of theirs; losses in the papers' order."""
    function = key if callable(key) else lambda row: row.get(key)
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(function(row), []).append(row)
    ranks = {LOSS_NAMES[loss]: place for place, loss in enumerate(LOSS_ORDER)}

    def rank(name: Any) -> tuple[int, bool, Any]:
        text = name is None or isinstance(name, str)
        return ranks.get(name, len(ranks)), text, str(name) if text else name

    return {name: groups[name] for name in sorted(groups, key=rank)}


def finals(rows: Iterable[AnyRow]) -> list[AnyRow]:
    """The last checkpoint of each run: the highest of those marked ``final``, else of all."""
    runs: dict[Any, list[AnyRow]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    # A run that was continued beyond its end has several marked rows.
    return [
        max(run, key=lambda row: (bool(row.get("final")), row["checkpoint"]))
        for run in runs.values()
    ]


def is_offline(row: Row) -> bool:
    """Trained on a fixed set of pairs by a direct alignment loss, or not said."""
    return row.get("algorithm") in (None, "daa", row.get("loss"))


def is_length_regularised(row: Row) -> bool:
    """Trained by R-DPO, DPO with a weight on the difference in length (arXiv 2403.19159)."""
    return row.get("loss") == "rdpo" or bool(row.get("length_alpha"))


def main_size(rows: Sequence[Row]) -> Any:
    """The model size that most losses were run with (then: that most rows have)."""
    sizes = split((row for row in rows if row.get("size") is not None), "size")
    if not sizes:
        return None
    return max(sizes, key=lambda size: (len(split(sizes[size], series_name)), len(sizes[size])))


def sweeps(rows: Iterable[Row]) -> dict[Any, list[Row]]:
    """The plain sweep of each preset: one model size, no length regularisation.

    A table without presets is one sweep with the name None. On-policy runs of the small world,
    whose gold reward is known, are left out: the claims are on direct alignment.
    """
    every = list(rows)
    world = any(row.get("gold") is not None for row in every)
    plain = [
        row for row in every
        if not is_length_regularised(row) and (is_offline(row) or not world)
    ]  # fmt: skip
    return {
        preset: [row for row in group if row.get("size") == main_size(group)]
        for preset, group in split(plain, "preset").items()
    }


def same_settings(
    groups: Mapping[Any, Sequence[Row]], columns: Sequence[str] = ("beta", "seed")
) -> dict[Any, list[Row]]:
    """Of every group, the rows whose settings all groups have: for fair comparisons."""

    def settings(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(column) for column in columns)

    shared = [{settings(row) for row in rows} for rows in groups.values()]
    everywhere = set.intersection(*shared) if shared else set()
    return {
        name: [row for row in rows if settings(row) in everywhere] for name, rows in groups.items()
    }


def curve(rows: Iterable[Row], column: str = "score") -> list[Point]:
    """Last checkpoints, averaged over the seeds of a beta, by rising distance.

    Runs without a beta are points of their own. Rows without ``column`` are left out.
    """
    last = [row for row in finals(rows) if row.get(column) is not None]
    groups = split(last, lambda row: row["run"] if row.get("beta") is None else row["beta"])
    points = [mean_point(group, column) for group in groups.values()]
    return sorted(points, key=lambda point: point.distance)


def mean_point(rows: Sequence[Row], column: str = "score") -> Point:
    """Mean distance and score of rows that differ by their seed alone."""
    scores = [float(row[column]) for row in rows]
    return Point(
        beta=rows[0].get("beta"),
        distance=statistics.fmean(distance(row) for row in rows),
        score=statistics.fmean(scores),
        stderr=standard_error(scores),
        rows=tuple(rows),
    )


class Hump(NamedTuple):
    """The best point of a curve, and how far the score falls beyond it."""

    best: Point
    farthest: Point
    fall: float
    """Score at the peak minus score at the farthest point, mean over seeds."""
    stderr: float | None
    """Of ``fall``, from the differences within seeds; None with one seed."""
    interior: bool
    """The peak is neither the nearest nor the farthest point, and the fall is not noise."""


def hump(points: Sequence[Point]) -> Hump | None:
    """Reads a curve by :func:`curve`; None for fewer than three points.

    The fall counts if it is above zero and, with two or more seeds, its 95 % interval is, too.
    """
    if len(points) < 3:
        return None
    best = max(points, key=lambda point: point.score)
    farthest = points[-1]
    falls = list(falls_by_seed(best, farthest).values())
    fall = statistics.fmean(falls) if falls else best.score - farthest.score
    stderr = standard_error(falls)
    inside = best is not points[0] and best is not points[-1]
    return Hump(best, farthest, fall, stderr, inside and fall > margin(stderr, len(falls)))


def falls_by_seed(best: Point, farthest: Point) -> dict[Any, float]:
    """By how much the score falls from one point to another, of the seeds that both have."""
    ends = {row.get("seed"): float(row["score"]) for row in farthest.rows}
    return {
        row.get("seed"): float(row["score"]) - ends[row.get("seed")]
        for row in best.rows
        if row.get("seed") in ends
    }


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation; None for fewer than three points or a constant."""
    if len(x) < 3 or min(x) == max(x) or min(y) == max(y):
        return None
    return statistics.correlation(x, y)


def comparable_loss(row: Row) -> Row:
    """The row with a held-out loss that can be compared between betas.

    The study's IPO loss is ``(h - 1 / (2 beta))^2``, whose unit is that of ``1 / beta^2``: over the
    betas it says little but the beta. Times ``4 beta^2`` it is ``(2 beta h - 1)^2``, a function of
    ``beta h`` as the other losses are, and as in the paper's common form. Other tables may hold
    other conventions, and stay as they are.
    """
    loss, beta = row.get("loss_value"), row.get("beta")
    if loss is None or not beta or row.get("loss") != "ipo" or row.get("gold") is None:
        return row
    return {**row, "loss_value": 4 * beta**2 * loss}


def column_pairs(rows: Iterable[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns, of the rows that have both as finite numbers."""
    pairs = [
        (float(row[x]), float(row[y]))
        for row in rows
        if row.get(x) is not None and row.get(y) is not None
    ]
    finite = [pair for pair in pairs if all(math.isfinite(value) for value in pair)]
    return [pair[0] for pair in finite], [pair[1] for pair in finite]
