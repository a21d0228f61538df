"""The columns of result tables, the same in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fastdaa.benchmarks import wording
from fastdaa.benchmarks.reading import Result


class Column(NamedTuple):
    """A heading, the words of a cell, and whether they are numbers."""

    heading: str
    cell: Callable[[Result], str]
    number: bool = True


def verdict(result: Result) -> str:
    """What stands where the speed-up would: the speed-up, ``WRONG``, or why there is none."""
    if result.status == "wrong":
        return "WRONG"
    return wording.ratio(result.speedup) if result.ok else result.status


def _spread(result: Result) -> str:
    low, high = result.seconds.get("p10"), result.seconds.get("p90")
    return wording.duration_range(low, high) if low and high else "-"


def _from_row(name: str, words: Callable[[float | None], str]) -> Callable[[Result], str]:
    return lambda result: words(result.row.get(name))


def _error_of(name: str) -> Callable[[Result], str]:
    return lambda result: wording.error(result.errors.get(name))


def _deterministic(result: Result) -> str:
    agrees = result.row.get("deterministic")
    return "-" if agrees is None else ("yes" if agrees else "no")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _rate(value: float | None) -> str:
    return "-" if value is None else wording.three_digits(value)


def _share(value: float | None) -> str:
    if value is None or math.isinf(value):
        return "-" if value is None else "not finite"
    return wording.three_digits(value) if value >= 1e-3 else "< 0.001"


def _status(result: Result) -> str:
    return "WRONG" if result.status == "wrong" else result.status


_WHO = (
    Column("contender", lambda result: result.contender, number=False),
    Column("version", lambda result: str(result.row.get("version") or "-"), number=False),
)
_TIME = (
    Column("median", lambda result: wording.duration(result.median)),
    Column("p10 - p90", _spread),
    Column("n", lambda result: wording.count(result.seconds.get("n"))),
)
_PEAK = Column("peak memory", lambda result: wording.size(result.peak))
_GATE = Column("error / limit", lambda result: _share(result.share_of_limit))
_SPEEDUP = Column("speed-up", verdict)
_STATUS = Column("status", _status, number=False)
_HEAD = (
    *_WHO,
    *_TIME,
    Column("x floor", lambda result: wording.ratio(result.over_floor)),
    Column("expected", _from_row("expected_seconds", wording.duration)),
    _PEAK,
    _GATE,
    _SPEEDUP,
)
_COLUMNS: dict[str, tuple[Column, ...]] = {
    "head": _HEAD,
    "loss": _HEAD,
    "memory": (
        *_WHO,
        _PEAK,
        Column("median", lambda result: wording.duration(result.median)),
        _GATE,
        _STATUS,
    ),
    "accuracy": (
        *_WHO,
        Column("log-prob, max", _error_of("logps")),
        Column("log-prob, rms", _error_of("logps_rms")),
        Column("sequence, rms", _error_of("sequence")),
        Column("loss", _error_of("loss")),
        Column("grad hidden", _error_of("dh")),
        Column("grad head", _error_of("dw")),
        _GATE,
        Column("repeatable", _deterministic, number=False),
        _STATUS,
    ),
    "step": (
        *_WHO,
        *_TIME,
        Column("pairs / s", _from_row("pairs_per_second", _rate)),
        Column("scored tokens / s", _from_row("scored_tokens_per_second", wording.count)),
        Column("FLOP use", _from_row("mfu", _percent)),
        _PEAK,
        _GATE,
        _SPEEDUP,
    ),
}


def columns_for(kind: str, results: Iterable[Result]) -> list[Column]:
    """The columns of a kind that hold something for at least one of the results."""
    shown = list(results)
    return [
        column
        for column in _COLUMNS.get(kind, _HEAD)
        if not column.number or any(column.cell(result) != "-" for result in shown)
    ]
