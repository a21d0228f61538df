"""Which checkpoints can be resumed from, and whose they are.

A killed process may leave half of a checkpoint behind, and one output folder may hold checkpoints
of several runs: those of the run that was started there last are the ones that count.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastdaa.train.checkpoint_files import defect
from fastdaa.train.run_record import (
    RUN_FILE,
    RunRecord,
    check_same_run,
    new_record,
    read_record,
)

logger = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)")
_STATE_FILE = "trainer_state.json"


def folder(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return Path(output_dir) / f"checkpoint-{step}"


def invalidate(checkpoint: Path) -> None:
    """Mark an existing checkpoint as unfinished before it is written again."""
    (checkpoint / _STATE_FILE).unlink(missing_ok=True)


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end.

    The Trainer writes ``trainer_state.json`` last, so a process killed while it saved leaves none,
    or half of one.
    """
    try:
        state = json.loads((Path(checkpoint) / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def complete(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Steps and folders of all complete checkpoints, of whatever run, by step."""
    return sorted((step, path) for step, path in _all(output_dir) if is_complete(path))


def last_complete(output_dir: str | Path) -> str | None:
    """The complete checkpoint of the highest step, of the run that was started there last.

    Where no run has left its record, all checkpoints count as one run's.
    """
    record = read_record(output_dir)
    found = complete(output_dir)
    own = [path for step, path in found if record is None or step in record.steps]
    return str(own[-1]) if own else None


def to_continue(output_dir: str | Path) -> str | None:
    """:func:`last_complete`, for a run that is to go on: the last whose files are not damaged.

    Raises:
        ValueError: there are checkpoints, but of other runs alone, or none that can be used.
    """
    found, record = complete(output_dir), read_record(output_dir)
    others = [path.name for step, path in found if record is not None and step not in record.steps]
    own = [path for _, path in found if path.name not in others]
    last, passed = None, []
    for path in reversed(own):
        why = defect(path)
        if why is None:
            last = str(path)
            break
        passed.append(f"{path.name}, which {why}")
    if passed and last is None:
        raise ValueError(
            f"resume_from_checkpoint: expected a checkpoint that can be continued in {output_dir}, "
            f"got {'; '.join(passed)}; its weights, if it has them, can be the --model of a new run"
        )
    if passed:
        logger.warning("%s: passed over %s", output_dir, "; ".join(passed))
    if record is not None and others and last is None:
        raise ValueError(
            "resume_from_checkpoint: expected a checkpoint of the run that was started last in "
            f"{output_dir} ({record.started}), which has none, got {', '.join(others)} of another "
            "run; give the path of one to continue that run, or leave the option out for a new one"
        )
    if others:
        logger.warning("%s: passed over %s of another run", output_dir, ", ".join(others))
    return last


def begin(
    output_dir: str | Path,
    resume: str | Path | bool | None,
    facts: Mapping[str, Any],
    *,
    rotates: bool,
) -> tuple[str | None, RunRecord]:
    """The checkpoint that a run continues from, if it does, and the record of the run.

    Args:
        resume: a checkpoint, or True for :func:`to_continue`.
        facts: see :class:`~fastdaa.train.run_record.RunRecord`.
        rotates: old checkpoints will be deleted.

    Raises:
        ValueError: the checkpoint is not whole or of another run, or others' would be deleted.
    """
    checkpoint = None
    if resume is True:
        checkpoint = to_continue(output_dir)
        if checkpoint is None:
            logger.warning("no complete checkpoint yet: training from the beginning")
    elif resume:
        checkpoint = str(resume)
        if not is_complete(checkpoint):
            raise ValueError(
                f"resume_from_checkpoint: expected a complete checkpoint, {checkpoint} has no "
                "readable trainer_state.json, which is written last"
            )
        check_files(checkpoint)
    record = new_record(facts)._replace(steps=_half_written(output_dir))
    if checkpoint is not None:
        check_same_run(checkpoint, facts)
        record = _continued(Path(output_dir), Path(checkpoint), record)
    if rotates:
        check_rotation(output_dir, record.steps)
    return checkpoint, record


def check_files(checkpoint: str | Path) -> None:
    """Look at the files of a checkpoint that was named.

    Raises:
        ValueError: one is missing or damaged.
    """
    why = defect(checkpoint)
    if why is not None:
        raise ValueError(
            f"resume_from_checkpoint: expected a checkpoint that can be continued, {checkpoint} "
            f"{why}"
        )


def _half_written(output_dir: str | Path) -> list[int]:
    """Steps of checkpoints that the run of before was killed in; they may be written over."""
    before = read_record(output_dir)
    found = (
        [] if before is None else [step for step, path in _all(output_dir) if step in before.steps]
    )
    return sorted(step for step in found if not is_complete(folder(output_dir, step)))


def _continued(output_dir: Path, checkpoint: Path, new: RunRecord) -> RunRecord:
    """The record of a run that goes on from a checkpoint."""
    now, run = read_record(output_dir), read_record(checkpoint)
    here = {path.resolve(): step for step, path in complete(output_dir)}
    step = here.get(checkpoint.resolve())
    if step is not None and now is not None and step in now.steps:
        return now._replace(facts=new.facts, best=None)
    # Another run was started in the folder since, or this one left no record.
    started = None if run is None else run.started
    steps = [
        other
        for path, other in here.items()
        if step is not None and getattr(read_record(path), "started", None) == started
    ]
    return RunRecord(started or new.started, new.facts, steps)


def check_rotation(output_dir: str | Path, own: Collection[int]) -> None:
    """Look for folders that ``save_total_limit`` would delete although the run did not write them.

    The Trainer takes every folder ``checkpoint-*`` for an old checkpoint of its own.

    Raises:
        ValueError: there is one that is not empty.
    """
    mine = {folder(output_dir, step) for step in own}
    found = Path(output_dir).glob("checkpoint-*")
    others = sorted(p.name for p in found if p.is_dir() and p not in mine and not _is_empty(p))
    if others:
        raise ValueError(
            f"save_total_limit: expected no checkpoints of other runs in {output_dir}, got "
            f"{', '.join(others)}, which would be deleted as old ones; move them away, choose "
            "another output_dir, or leave the limit out"
        )


def remove_incomplete(output_dir: str | Path, own: Collection[int] = ()) -> None:
    """Delete what killed processes have left half-written: empty folders, and those of ``own``."""
    for step, path in _all(output_dir):
        if (step in own or _is_empty(path)) and not is_complete(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_empty(checkpoint: Path) -> bool:
    """Whether nothing was written yet but who writes it."""
    return all(path.stem == Path(RUN_FILE).stem for path in checkpoint.iterdir())


def _all(output_dir: str | Path) -> Iterator[tuple[int, Path]]:
    root = Path(output_dir)
    for path in list(root.iterdir()) if root.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), path
