"""Many on-policy runs, kept as :mod:`fastdaa.study.kept_runs` does.

Their rows are told apart by the column ``algorithm``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdaa.study.kept_runs import REFERENCES, SweepResult, complete, keep
from fastdaa.study.online_plan import ExactRun, OnlineRun
from fastdaa.study.table import Table, read_table

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
        workers, console: as in :func:`fastdaa.study.kept_runs.complete`.

    Raises:
        ValueError, KeyboardInterrupt: as there.
    """
    return complete(
        _with_worlds(runs), Path(output), _perform, _kind_of, workers=workers, console=console
    )


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


def _kind_of(task: Task) -> str:
    return "runs" if isinstance(task, OnlineRun) else "worlds"


def _perform(output: Path, task: Task) -> str:
    """Does a task and keeps its rows; a few words about it."""
    from fastdaa.study.online_world import run_exact, run_online

    began = time.perf_counter()
    references = output / REFERENCES
    if isinstance(task, ExactRun):
        rows = run_exact(task, references)
    else:
        rows = run_online(task, references)
    seconds = time.perf_counter() - began
    keep(task, rows, seconds, output)
    if isinstance(task, ExactRun):
        return f"{seconds:.1f} s"
    last = rows[-1]
    kl, proxy, gold = last["kl"], last["proxy"], last["gold"]
    return f"KL {kl:.2f}  proxy {proxy:+.2f}  gold {gold:+.2f}  {seconds:.1f} s"
