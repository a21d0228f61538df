"""Files of a run that grow line by line: one JSON object a line, and numbers for older ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdaa.whole_file import whole_file


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines, each with its object, of a file that may be missing.

    A process that is killed may leave half a line, which does not count.
    """
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield line + "\n", row


def replace_text(path: Path, text: str) -> None:
    """Write the whole file at once."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def put_aside(files: Sequence[Path]) -> None:
    """Keep the files of an earlier run, ``track.1.jsonl`` and so on, by a number free for all.

    Empty ones stay.
    """
    number = 1
    while any(_numbered(file, number).exists() for file in files):
        number += 1
    for file in files:
        if file.is_file() and file.stat().st_size:
            file.rename(_numbered(file, number))


def _numbered(file: Path, number: int) -> Path:
    return file.with_name(f"{file.stem}.{number}{file.suffix}")
