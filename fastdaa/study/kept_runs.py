"""Runs over worker processes: each finished one is kept, and none is done twice.

A study's folder gets ``runs/<run id>/rows.jsonl`` with ``done.json`` beside it once the run is
finished, and ``points.jsonl``, the rows of all of them.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fastdaa.study.json_file import write_json
from fastdaa.study.pool import outcomes, worker_count
from fastdaa.study.progress import bars
from fastdaa.study.table import read_table, write_table
from fastdaa.writable import check_writable

if TYPE_CHECKING:
    from rich.console import Console

    from fastdaa.study.columns import Row

POINTS = "points.jsonl"
REFERENCES = "world"
"""Folder in which references are kept, made once for all runs of a world."""


class SweepResult(NamedTuple):
    """What a sweep did."""

    finished: int
    """Runs of this call."""
    kept: int
    """Runs that an earlier call had finished."""
    failed: dict[str, str]
    """Run ids, each with its error in one line."""
    seconds: float


class Kept(Protocol):
    """A run whose rows are kept."""

    @property
    def id(self) -> str:
        """Name of its folder."""

    def settings(self) -> dict[str, Any]:
        """Everything that its numbers depend on, as JSON can hold it."""

    def fingerprint(self) -> str:
        """Hash of the settings."""


def complete(
    runs: Sequence[Kept],
    output: Path,
    perform: Callable[[Path, Any], str],
    kind_of: Callable[[Any], str],
    *,
    before: Callable[[Sequence[Any]], Sequence[Any]] = lambda pending: (),
    workers: int | None = None,
    console: Console | None = None,
) -> SweepResult:
    """Performs what is not done yet, and writes ``points.jsonl`` from everything that is.

    Args:
        runs: in the order in which they start.
        output: the study's folder.
        perform: does a run in that folder and keeps it (:func:`keep`); a few words about it.
        kind_of: what a run is counted as.
        before: from the runs that are to be done to other tasks that ``perform`` does before them;
            of those nothing is kept, and a run that needs one fails with it and says so itself.
        workers: processes, each of one thread; by default one a core, at most ``MOST_WORKERS``.
        console: shows progress there.

    Raises:
        ValueError: no runs, or a run of the folder that was done under other settings.
        OSError: the folder cannot be written to.
        KeyboardInterrupt: after Ctrl-C; what is finished is kept, in ``points.jsonl`` too.
    """
    began = time.perf_counter()
    workers = worker_count(workers)
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    pending = [run for run in runs if not is_done(run, output)]
    if pending:
        check_writable(output)
    failed: dict[str, str] = {}
    try:
        if pending:
            tasks = [*before(pending), *pending]
            failed = _run_all(tasks, partial(perform, output), kind_of, workers, console)
    finally:
        merge_points(output)
    failed = {run.id: failed[run.id] for run in pending if run.id in failed}
    seconds = time.perf_counter() - began
    return SweepResult(len(pending) - len(failed), len(runs) - len(pending), failed, seconds)


def _run_all(
    tasks: Sequence[Any],
    perform: Callable[[Any], str],
    kind_of: Callable[[Any], str],
    workers: int,
    console: Console | None,
) -> dict[str, str]:
    """Errors by task."""
    failed: dict[str, str] = {}
    with bars(console) as shown:
        for kind, count in Counter(map(kind_of, tasks)).items():
            shown.add(kind, count)
        for task, outcome in outcomes(perform, tasks, workers):
            words = f"{task.id}  {outcome.result}"
            if outcome.error is not None:
                words = f"failed: {task.id}: {outcome.error}"
                failed[task.id] = outcome.error
            shown.advance(kind_of(task), words)
            if outcome.error is not None:
                shown.say(words)
    return failed


def is_done(run: Kept, output: Path) -> bool:
    """Whether the run is finished in the study's folder.

    Raises:
        ValueError: it is, but with other settings.
    """
    path = output / "runs" / run.id / "done.json"
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # a file in its place is said before the runs
        return False
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from None
    if done.get("fingerprint") == run.fingerprint():
        return True
    differences = ", ".join(_differences(done.get("settings", {}), run.settings()))
    raise ValueError(
        f"run {run.id}: expected the settings that it was done with in {output}, got others "
        f"({differences}); choose another folder, or delete {path.parent}"
    )


def keep(run: Kept, rows: Sequence[Row], seconds: float, output: Path) -> None:
    """Write the rows of a finished run, and then that it is done."""
    folder = output / "runs" / run.id
    write_table(folder / "rows.jsonl", rows)
    # Written last: it says that the rows are complete.
    write_json(
        folder / "done.json",
        {
            "run": run.id,
            "fingerprint": run.fingerprint(),
            "settings": run.settings(),
            "rows": len(rows),
            "seconds": seconds,
        },
    )


def merge_points(output: Path) -> Path | None:
    """Write ``points.jsonl`` from all finished runs of the folder; None if there is none."""
    rows: list[Row] = []
    for done in sorted((output / "runs").glob("*/done.json")):
        rows += read_table(done.with_name("rows.jsonl"))
    if not rows:
        return None
    write_table(output / POINTS, rows)
    return output / POINTS


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} {old!r} then, {new!r} now"
