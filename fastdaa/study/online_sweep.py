"""Many on-policy runs over worker processes, kept as the sweep of pairs keeps its runs (E8).

A study's folder gets ``runs/<run id>/rows.jsonl`` with ``done.json`` beside it, and everything that
is finished goes into ``points.jsonl``, told apart by the column ``algorithm``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastdaa.study.json_file import write_json
from fastdaa.study.online_plan import ExactRun, OnlineRun
from fastdaa.study.pool import outcomes, worker_count
from fastdaa.study.progress import bars
from fastdaa.study.sweep import SweepResult, is_done, merge_points
from fastdaa.study.table import Table, read_table, write_table

if TYPE_CHECKING:
    from rich.console import Console

    from fastdaa.study.columns import Row

Task = OnlineRun | ExactRun


def online_sweep(
    runs: Sequence[OnlineRun],
    output: str | Path,
    *,
    workers: int | None = None,
    console: Console | None = None,
) -> SweepResult:
    """Runs what is not done yet, and writes ``points.jsonl`` from everything that is.

    Args:
        runs: see :func:`fastdaa.study.online_plan.online_grid`.
        output: the study's folder.
        workers: processes of one thread each; by default one a core.
        console: shows progress there.

    Raises:
        ValueError: no runs, or a run of the folder that was done under other settings.
        KeyboardInterrupt: after Ctrl-C; what is finished is kept, in ``points.jsonl`` too.
    """
    began = time.perf_counter()
    output, workers = Path(output), worker_count(workers)
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    tasks = _with_worlds(runs)
    pending = [task for task in tasks if not is_done(task, output)]  # type: ignore[arg-type]
    failed: dict[str, str] = {}
    try:
        if pending:
            _run_all(pending, output, workers, failed, console)
    finally:
        merge_points(output)
    finished = len(pending) - len(failed)
    return SweepResult(finished, len(tasks) - len(pending), failed, time.perf_counter() - began)


def online_rows(runs: Sequence[OnlineRun], output: str | Path) -> Table:
    """The rows of those runs that are finished, and of their worlds' exact policies."""
    rows: list[Row] = []
    for task in _with_worlds(runs):
        folder = Path(output) / "runs" / task.id
        if (folder / "done.json").is_file():
            rows += read_table(folder / "rows.jsonl")
    return Table(rows)


def _with_worlds(runs: Sequence[OnlineRun]) -> list[Task]:
    """Worlds first: they make what their runs share, a reference and a reward model."""
    worlds = dict.fromkeys(ExactRun(run.preset, run.size, run.seed, run.language) for run in runs)
    return [*worlds, *runs]


def _run_all(
    pending: list[Task],
    output: Path,
    workers: int,
    failed: dict[str, str],
    console: Console | None,
) -> None:
    with bars(console) as shown:
        kinds = {task.id: "runs" if isinstance(task, OnlineRun) else "worlds" for task in pending}
        for kind in ("worlds", "runs"):
            count = sum(found == kind for found in kinds.values())
            if count:
                shown.add(kind, count)
        for task, outcome in outcomes(partial(_perform, output), pending, workers):
            words = f"{task.id}  {outcome.result}"
            if outcome.error is not None:
                words = f"failed: {task.id}: {outcome.error}"
                failed[task.id] = outcome.error
            shown.advance(kinds[task.id], words)
            if outcome.error is not None:
                shown.say(words)


def _perform(output: Path, task: Task) -> str:
    """Does a task and keeps its rows; a few words about it."""
    from fastdaa.study.online_world import run_exact, run_online

    began = time.perf_counter()
    references = output / "world"
    online = isinstance(task, OnlineRun)
    rows: list[Row] = (
        run_online(task, references) if isinstance(task, OnlineRun) else run_exact(task, references)
    )
    folder = output / "runs" / task.id
    write_table(folder / "rows.jsonl", rows)
    seconds = time.perf_counter() - began
    # Written last: it says that the rows are complete.
    write_json(
        folder / "done.json",
        {
            "run": task.id,
            "fingerprint": task.fingerprint(),
            "settings": task.settings(),
            "rows": len(rows),
            "seconds": seconds,
        },
    )
    if not online:
        return f"{seconds:.1f} s"
    last = rows[-1]
    kl, proxy, gold = last["kl"], last["proxy"], last["gold"]
    return f"KL {kl:.2f}  proxy {proxy:+.2f}  gold {gold:+.2f}  {seconds:.1f} s"
