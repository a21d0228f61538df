"""Which pictures a kind of benchmark gets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastdaa.benchmarks import wording
from fastdaa.benchmarks.reading import Result, by_case, case_details, case_title, pace
from fastdaa.benchmarks.report.figures import Picture, bars, curves, dots


class _Over(NamedTuple):
    """A value that is drawn over the number of tokens."""

    word: str
    value: Callable[[Result], float | None]
    words: Callable[[float], str]
    base: int = 10


def _gradient_error(result: Result) -> float | None:
    return max(
        (result.errors[name] for name in ("dh", "dw") if name in result.errors), default=None
    )


_TIME = _Over("time", lambda result: result.median, wording.duration)
_PEAK = _Over("peak memory", lambda result: result.peak, wording.size, 4)
_ERROR = _Over("relative gradient error", _gradient_error, wording.error)
_OVER_TOKENS = {
    "head": (_TIME, _PEAK, _ERROR),
    "loss": (_TIME, _PEAK, _ERROR),
    "memory": (_PEAK, _TIME),
    "accuracy": (_ERROR,),
}


def draw(kind: str, results: Sequence[Result], prefix: str = "") -> list[Picture]:
    """Curves where cases differ in N alone, then one picture a case."""
    found = [
        curves(
            _file(prefix, kind, over.word, str(place)),
            f"{over.word.capitalize()} over scored tokens",
            _words(_without_tokens(members[0])),
            members,
            over.value,
            over.words,
            over.base,
        )
        for over in _OVER_TOKENS.get(kind, ())
        for place, members in enumerate(_series(results))
    ]
    found += [_of_case(kind, case, members, prefix) for case, members in by_case(results).items()]
    return [picture for picture in found if picture is not None]


def _of_case(kind: str, case: str, members: Sequence[Result], prefix: str) -> Picture | None:
    name, title = _file(prefix, kind, case), case_title(members[0])
    details = case_details(members[0])
    if kind == "accuracy":
        hint = f"{details}. Gradients: relative error; log-probs and loss: in nats"
        return dots(name, title, hint, members)
    if kind == "memory":
        return bars(name, title, f"{details}. Peak memory", members, lambda r: r.peak, wording.size)
    if kind == "step":
        return bars(name, title, f"{details}. Time a pair", members, pace, wording.duration)
    # Paths make different numbers of products; none of them can do with fewer than the fewest.
    floors = [r.row.get("floor_seconds") for r in members if r.ok and r.family != "floor"]
    return bars(
        name,
        title,
        f"{details}. Median time",
        members,
        lambda result: result.median,
        wording.duration,
        floor=min((float(seconds) for seconds in floors if seconds), default=None),
    )


def _series(results: Sequence[Result]) -> list[list[Result]]:
    """Results whose cases differ in nothing but N."""
    series: dict[str, list[Result]] = {}
    for result in results:
        fixed = {k: v for k, v in result.params.items() if k not in ("N", "entropy", "pairs")}
        series.setdefault(json.dumps(fixed, sort_keys=True, default=str), []).append(result)
    return [members for members in series.values() if len({r.tokens for r in members}) > 1]


def _without_tokens(result: Result) -> Result:
    params = {k: v for k, v in result.params.items() if k not in ("N", "entropy")}
    return Result({**result.row, "case_params": params})


def _words(result: Result) -> str:
    return f"{case_title(result)}, {case_details(result)}".rstrip(", ")


def _file(*words: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", "_".join(word for word in words if word).lower()).strip("-")
