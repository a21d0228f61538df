"""Which checkpoints can be resumed from: a killed process may leave half of one behind."""

from __future__ import annotations

import json
import re
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
    root = Path(output_dir)
    if not root.is_dir():
        return None
    found = []
    for path in root.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and is_complete(path):
            found.append((int(match[1]), str(path)))
    return max(found)[1] if found else None
