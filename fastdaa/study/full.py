"""The whole study in one call: all experiments, one step after another, and the page.

What is done already is skipped, so an interrupted study goes on where it stopped. ``study.json``
says what was run, with what, and how long it took::

    {"settings": {"seeds": [0, 1, 2], "runs": ["H-dpo-b0.005-s0-d32", ...]},
     "steps": {"tree": {"seconds": 30.1, "settings": {...}, "result": "one line"}, ...},
     "failed": {"sweep": {"<run id>": "<error>"}, "tilt": "<error>"},
     "seconds": 1200.3, "workers": 2,
     "versions": {...}, "commit": "4058bf0" or null, "cores": 2, "machine": "..."}

``seconds`` are summed over the calls that it took.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.counted import counted
from fastdaa.study.environment import environment
from fastdaa.study.json_file import write_json
from fastdaa.study.kept_runs import POINTS, is_done
from fastdaa.study.plan import Run, full_study
from fastdaa.study.pool import worker_count
from fastdaa.study.progress import bars
from fastdaa.study.sweep import sweep
from fastdaa.study.table import read_table
from fastdaa.writable import check_writable

if TYPE_CHECKING:
    from rich.console import Console

STUDY_FILE = "study.json"


@dataclass
class Study:
    """What the steps of a study share."""

    output: Path
    runs: list[Run]
    seeds: tuple[int, ...]
    workers: int
    console: Console | None = None
    failed_runs: dict[str, str] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """A line on the console, if there is one."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Step(NamedTuple):
    """One part of a study."""

    name: str
    title: str
    files: tuple[str, ...]
    """What it leaves in the folder."""
    work: Callable[[Study], str]
    """Does it, and returns one line about it."""
    settings: Callable[[Study], dict[str, Any]] = lambda study: {}
    """If they change, the step is done again."""
    always: bool = False
    """Reads what the others left, and takes seconds."""


def run_full(
    output: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    runs: Sequence[Run] | None = None,
    steps: Sequence[Step] | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Does every step that is not done yet; a step or run that fails does not stop the others.

    Args:
        output: the study's folder.
        seeds: of worlds, references and runs.
        runs: instead of :func:`fastdaa.study.plan.full_study`.
        steps: instead of :func:`all_steps`.
        workers: see :func:`fastdaa.study.sweep.sweep`.

    Returns:
        What ``study.json`` holds; ``failed`` is empty if everything went well.

    Raises:
        ValueError: no seeds, or a folder with other settings.
        OSError: the folder cannot be written to.
        KeyboardInterrupt: after Ctrl-C; finished steps and runs are kept.
    """
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    workers = worker_count(workers)
    planned = full_study(seeds) if runs is None else list(runs)
    study = Study(Path(output), planned, tuple(seeds), workers, console)
    for run in planned:
        is_done(run, study.output)  # raises for other settings, before anything is written
    check_writable(study.output)
    steps = all_steps() if steps is None else steps
    record = _read_record(study.output / STUDY_FILE)
    record["settings"] = {"seeds": list(seeds), "runs": [run.id for run in planned]}
    record["failed"] = {}
    for number, step in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}] {step.title}"
        if _is_done(step, study, record):
            study.say(f"{head}: done before")
            continue
        study.say(head)
        _do(step, study, record)
    return record


def _do(step: Step, study: Study, record: dict[str, Any]) -> None:
    """A step, and what ``study.json`` says about it, however it ends."""
    began = time.perf_counter()
    before = record["steps"].pop(step.name, {})
    result = None
    study.failed_runs = {}
    try:
        result = step.work(study)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        record["failed"][step.name] = text
        study.say(f"  failed: {text}")
    finally:
        seconds = time.perf_counter() - began
        # Only what adds to earlier results adds to their time.
        total = seconds + (before.get("seconds", 0.0) if step.name == "sweep" else 0.0)
        record["steps"][step.name] = {
            "seconds": total,
            "settings": step.settings(study),
            "result": result,
        }
        record["seconds"] = sum(each["seconds"] for each in record["steps"].values())
        if study.failed_runs:
            record["failed"][step.name] = study.failed_runs
        _write_record(study, record)
    if result is not None:
        study.say(f"  {result} ({seconds:.0f} s)")


def _is_done(step: Step, study: Study, record: dict[str, Any]) -> bool:
    known = record["steps"].get(step.name, {})
    return (
        not step.always
        and known.get("result") is not None
        and known.get("settings") == json.loads(json.dumps(step.settings(study)))
        and all((study.output / file).is_file() for file in step.files)
    )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        record = {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from None
    return {**record, "steps": record.get("steps", {})}


def _write_record(study: Study, record: dict[str, Any]) -> None:
    record.update(environment(), workers=study.workers)
    write_json(study.output / STUDY_FILE, record)


def all_steps() -> list[Step]:
    """Every step in its order."""
    return [
        Step("tree", "null space, tree of responses, tabular oracles", ("tree.json",), _tree),
        Step("tilt", "exponential tilting and best of n", ("tilt.jsonl",), _tilt, _first_seed),
        Step(
            "estimators",
            "KL estimators against enumeration",
            ("estimators.json",),
            _estimators,
            _first_seed,
        ),
        sweep_step(),
        *closing_steps(),
    ]


def sweep_step() -> Step:
    """The runs of the study that are not done yet."""
    return Step("sweep", "trainings", (POINTS,), _sweep, always=True)


def closing_steps() -> list[Step]:
    """What reads the rows of a sweep, and the page."""
    return [
        Step("fit", "laws fitted", ("fits.json",), _fit, always=True),
        Step("correlate", "correlations", ("correlations.json",), _correlate, always=True),
        Step("report", "page and figures", ("index.html",), _report, always=True),
    ]


def _first_seed(study: Study) -> dict[str, Any]:
    return {"seed": study.seeds[0]}


def _sweep(study: Study) -> str:
    result = sweep(study.runs, study.output, workers=study.workers, console=study.console)
    study.failed_runs = result.failed
    kept = f", {result.kept} done before" if result.kept else ""
    failed = f", {len(result.failed)} failed" if result.failed else ""
    return f"{counted(result.finished, 'run')}{kept}{failed}"


def _fit(study: Study) -> str:
    from fastdaa.study.fit import fit_table

    content = fit_table(read_table(study.output / POINTS))
    write_json(study.output / "fits.json", content)
    return counted(len(content["groups"]), "curve")


def _tree(study: Study) -> str:
    from fastdaa.study.exact import failures, run_exact
    from fastdaa.study.tree import TreeSettings

    settings = TreeSettings()
    with bars(study.console) as shown:
        shown.add("trees", settings.runs)
        content = run_exact(settings, lambda done, total: shown.reach("trees", done), study.workers)
    write_json(study.output / "tree.json", content)
    wrong = failures(content)
    return f"{counted(len(content['runs']), 'training')}; " + (
        f"claims that do not hold: {'; '.join(wrong)}" if wrong else "every claim holds"
    )


def _tilt(study: Study) -> str:
    from fastdaa.study.tilt import run_tilt

    seeds = study.seeds[:1]
    lines = run_tilt(study.output, seeds, lambda text: study.say(f"  {text}"))
    return f"{counted(len(lines), 'pair')} of curves"


def _estimators(study: Study) -> str:
    from fastdaa.study.estimators import run_estimators

    lines = run_estimators(study.output, study.seeds[0], lambda text: study.say(f"  {text}"))
    return counted(len(lines), "policy")


def _correlate(study: Study) -> str:
    from fastdaa.study.correlate import correlate_table

    content = correlate_table(read_table(study.output / POINTS))
    write_json(study.output / "correlations.json", content)
    return f"{counted(len(content['quality']), 'correlation')} with quality"


def _report(study: Study) -> str:
    from fastdaa.study.report import build_report

    return build_report(study.output, console=study.console).name
