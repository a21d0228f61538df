"""Times of one case from several runs: they met different machines and do not compare."""

from __future__ import annotations

from collections.abc import Iterable

from fastdaa.benchmarks.reading import Result, by_case
from fastdaa.benchmarks.wording import join
from fastdaa.counted import counted

_TIMED = ("head", "loss", "step")
_SPEEDUPS = {
    "step": "speed-ups of a later run are over trl of the first",
    "head": "each speed-up is over pytorch in the contender's own run",
}
_SPEEDUPS["loss"] = _SPEEDUPS["head"]


def mixed_runs(results: Iterable[Result]) -> list[str]:
    """A line for each case whose right contenders were not timed in the same run.

    It happens where a later command adds a contender to a file, or tries one again that failed.
    """
    lines = []
    for case, members in by_case(r for r in results if r.kind in _TIMED).items():
        runs: dict[str, list[Result]] = {}
        for result in members:
            if result.ok and result.family != "floor" and result.median:
                runs.setdefault(str(result.row.get("run")), []).append(result)
        if len(runs) > 1:
            said = "; ".join(
                f"{join([r.contender for r in run])} at {run[0].row.get('time', 'an unknown time')}"
                for run in runs.values()
            )
            lines.append(
                f"{case}: timed in {counted(len(runs), 'run')} ({said}), so times do not compare; "
                f"{_SPEEDUPS[members[0].kind]}"
            )
    return lines
