"""Many runs over worker processes: each finished one is kept, and none is done twice.

A study's folder gets ``world/`` (references, made once), ``runs/<run id>/rows.jsonl`` with
``done.json`` beside it once the run is finished, and ``points.jsonl``, the rows of all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.study.json_file import write_json
from fastdaa.study.plan import Run, unique
from fastdaa.study.pool import outcomes, worker_count
from fastdaa.study.progress import bars
from fastdaa.study.table import read_table, write_table

if TYPE_CHECKING:
    from rich.console import Console

    from fastdaa.study.columns import Row
    from fastdaa.study.language import Language
    from fastdaa.study.presets import ModelSize, Preset

POINTS = "points.jsonl"


class SweepResult(NamedTuple):
    """What a sweep did."""

    finished: int
    """Runs of this call."""
    kept: int
    """Runs that an earlier call had finished."""
    failed: dict[str, str]
    """Run ids, each with its error in one line."""
    seconds: float


def sweep(
    runs: Sequence[Run],
    output: str | Path,
    *,
    workers: int | None = None,
    console: Console | None = None,
) -> SweepResult:
    """Runs what is not done yet, and writes ``points.jsonl`` from everything that is.

    Args:
        runs: see :mod:`fastdaa.study.plan`.
        output: the study's folder.
        workers: processes, each of one thread; by default one a core, at most ``MOST_WORKERS``.
        console: shows progress there.

    Raises:
        ValueError: no runs, or a run of the folder that was done under other settings.
        KeyboardInterrupt: after Ctrl-C; what is finished is kept, in ``points.jsonl`` too.
    """
    began = time.perf_counter()
    output = Path(output)
    workers = worker_count(workers)
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    runs = unique(runs)
    pending = [run for run in runs if not is_done(run, output)]
    failed: dict[str, str] = {}
    try:
        if pending:
            _run_all(pending, output, workers, failed, console)
    finally:
        merge_points(output)
    finished = len(pending) - len(failed)
    return SweepResult(finished, len(runs) - len(pending), failed, time.perf_counter() - began)


def _run_all(
    pending: list[Run], output: Path, workers: int, failed: dict[str, str], console: Console | None
) -> None:
    """References first, then the runs, all by the same workers: starting one takes seconds."""
    references = list(dict.fromkeys(map(_World.of, pending)))
    tasks: list[_World | Run] = [*references, *pending]
    with bars(console) as shown:
        shown.add("references", len(references))
        shown.add("runs", len(pending))
        for task, outcome in outcomes(partial(_perform, output), tasks, workers):
            if outcome.error is None:
                words = f"{task.id}  {outcome.result}"
            else:
                words = f"failed: {task.id}: {outcome.error}"
                failed[task.id] = outcome.error
            shown.advance("runs" if isinstance(task, Run) else "references", words)
            if outcome.error is not None:
                shown.say(words)
    # Without its reference a run has failed, too, and says so itself.
    for reference in references:
        failed.pop(reference.id, None)


class _World(NamedTuple):
    """What has a reference of its own."""

    preset: Preset
    size: ModelSize
    seed: int
    language: Language

    @classmethod
    def of(cls, run: Run) -> _World:
        return cls(run.preset, run.size, run.seed, run.language)

    @property
    def id(self) -> str:
        return f"reference {self.preset.name}-s{self.seed}-{self.size.name}"


def is_done(run: Run, output: Path) -> bool:
    """Whether the run is finished in the study's folder.

    Raises:
        ValueError: it is, but with other settings.
    """
    path = output / "runs" / run.id / "done.json"
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
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


def merge_points(output: Path) -> Path | None:
    """Write ``points.jsonl`` from all finished runs of the folder; None if there is none."""
    rows: list[Row] = []
    for done in sorted((output / "runs").glob("*/done.json")):
        rows += read_table(done.with_name("rows.jsonl"))
    if not rows:
        return None
    write_table(output / POINTS, rows)
    return output / POINTS


def _perform(output: Path, task: _World | Run) -> str:
    """Makes a reference, or does a run and keeps it; a few words about it."""
    from fastdaa.study.run_one import run_one, setting

    began = time.perf_counter()
    if isinstance(task, _World):
        setting(*task, output / "world")
        return f"{time.perf_counter() - began:.1f} s"
    folder = output / "runs" / task.id
    rows = run_one(task, output / "world")
    write_table(folder / "rows.jsonl", rows)
    # Written last: it says that the rows are complete.
    write_json(
        folder / "done.json",
        {
            "run": task.id,
            "fingerprint": task.fingerprint(),
            "settings": task.settings(),
            "rows": len(rows),
            "seconds": time.perf_counter() - began,
        },
    )
    last = rows[-1]
    return f"KL {last['kl']:.2f}  gold {last['gold']:+.2f}  {last['seconds']:.1f} s"


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} {old!r} then, {new!r} now"
