"""The newest rows of a check, looked up by path, contender and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fastdaa.benchmarks.gpu import questions as asked
from fastdaa.benchmarks.gpu.targets import TARGETS, Judged, judge
from fastdaa.benchmarks.reading import Result, latest
from fastdaa.benchmarks.rows import alike


class Answers:
    """The newest row of every contender on every case of one run's sizes and device.

    Rows of other code, libraries or devices than the newest row's answer nothing: what fails by now
    would be shown as it was.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], size: str, device: str):
        self.size, self.device = asked.SIZES[size], device
        given = list(rows)
        newest = max(given, key=lambda row: str(row.get("time")), default={})
        chosen = [row for row in given if alike(row, newest)]
        self.left_out = len(given) - len(chosen)
        self.results = {(r.kind, r.case, r.contender): r for r in latest(chosen)}

    def of(self, path: str, name: str, **changes: Any) -> Result | None:
        """A contender on the case of a path, with other sizes if given."""
        case = asked.case_of(path, replace(self.size.case, **changes))
        return self.results.get(("loss" if case.is_loss else "head", case.id, name))

    def token_counts(self) -> list[int]:
        """Every number of tokens that is asked for, ascending."""
        return sorted({self.size.case.tokens, *self.size.tokens})

    def ours(self, path: str, **changes: Any) -> list[Result]:
        """fastdaa's contenders there that have a row."""
        found = (self.of(path, name, **changes) for name in asked.ours(path))
        return [result for result in found if result is not None]

    def judged(self) -> list[Judged]:
        """Every target."""
        return [judge(t, self.ours(t.path), self.of(t.path, "trl")) for t in TARGETS]
