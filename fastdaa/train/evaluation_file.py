"""The JSON file of an evaluation: whether it can be written, and writing it at once."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_output(given: str | None) -> Path | None:
    """The path that ``--output`` names, looked at before any work; None without it.

    Raises:
        OSError: it cannot be written.
        ValueError: it holds something else than an evaluation.
    """
    if given is None:
        return None
    path = Path(given).expanduser()
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir():
        raise OSError(f"output: expected a JSON file in a folder that exists, got {given}")
    if path.exists() and not (path.is_file() and _is_ours(path)):
        raise ValueError(
            f"output: expected a new file or one of this command, {given} holds something else"
        )
    try:
        # Neither modes nor mounts tell it as surely.
        with tempfile.TemporaryFile(dir=folder):
            return path
    except OSError as error:
        raise OSError(
            f"output: expected a folder to write to, {folder} cannot be written: {error.strerror}"
        ) from error


def _is_ours(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
        read = json.loads(text) if text else None
    except (OSError, ValueError):
        return False
    ours = isinstance(read, dict) and {"model", "objective", "metrics"} <= read.keys()
    return ours or not text


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """The numbers as JSON, at once; null where one is not finite."""
    finite = {n: v if math.isfinite(v) else None for n, v in facts["metrics"].items()}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(
        json.dumps({**facts, "metrics": finite}, indent=1, allow_nan=False) + "\n",
        encoding="utf-8",
    )
    os.replace(temporary, path)
