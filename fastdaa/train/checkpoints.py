"""Which checkpoints can be resumed from: a killed process may leave half of one behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

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


def last_complete(output_dir: str | Path) -> str | None:
    """The complete checkpoint of the highest step in ``output_dir``, or None."""
    complete = [(step, str(path)) for step, path in _all(output_dir) if is_complete(path)]
    return max(complete)[1] if complete else None


def remove_incomplete(output_dir: str | Path) -> None:
    """Delete what killed processes have left half-written."""
    for _, path in _all(output_dir):
        if not is_complete(path):
            shutil.rmtree(path, ignore_errors=True)


def _all(output_dir: str | Path) -> Iterator[tuple[int, Path]]:
    root = Path(output_dir)
    for path in list(root.iterdir()) if root.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), path
