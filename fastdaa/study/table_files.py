"""Raw rows of tables: JSON lines, JSON, CSV, and the folders in which commands leave them."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdaa.counted import counted
from fastdaa.study.columns import LABELS, Row

TABLES = ("points.jsonl", "track.jsonl")
"""What a folder is searched for: the table of a study, that of a tracked run."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows that are not checked yet, each with the place that error messages name.

    Args:
        path: a ``.jsonl`` file; a ``.json`` file of JSON lines or of one list; a ``.csv`` or
            ``.tsv`` file with a header (empty cells are unknown values); or a folder with one of
            ``TABLES``, or of a run of ``fastdaa online`` that was measured on held-out prompts.

    Raises:
        FileNotFoundError: no such file, or a folder without a table.
        ValueError: a file of another kind, or that is broken.
    """
    try:
        yield from _rows_of(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from None


def _rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    kind = path.suffix.lower()
    if path.is_dir():
        yield from _folder_rows(path)
    elif not path.is_file():
        raise FileNotFoundError(f"table: expected an existing .jsonl or .csv file, got {path}")
    elif kind in _DELIMITERS:
        yield from _csv_rows(path, _DELIMITERS[kind])
    elif kind == ".json" and path.read_text(encoding="utf-8").lstrip()[:1] == "[":
        yield from _list_rows(path)
    elif kind in (".jsonl", ".json", ".ndjson"):
        yield from json_rows(path)
    else:
        raise ValueError(f"table: expected a .jsonl or .csv file, got {path}")


def _folder_rows(folder: Path) -> Iterator[tuple[str, Row]]:
    # It brings trainers with it, which a table does not need.
    from fastdaa.study.online_table import holds_online_run, online_rows

    for name in TABLES:
        if (folder / name).is_file():
            yield from json_rows(folder / name)
            return
    if not holds_online_run(folder):
        raise FileNotFoundError(
            f"table: expected {' or '.join(TABLES)}, or a run of `fastdaa online` with held-out "
            f"prompts, in {folder}, got none of them"
        )
    yield from online_rows(folder)


def json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Objects of a file of JSON lines, each with its place; without half a one at the end.

    Raises:
        ValueError: a line that is no JSON object.
    """
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                # The last line of a process that was killed; the next one to append cuts it off.
                if line.startswith("{") and not line.endswith("\n"):
                    print(f"{where}: the file breaks off in this row; left out", file=sys.stderr)
                    return
                raise ValueError(f"{where}: expected one JSON object, got {error}") from None
            yield where, _object(row, where)


def _list_rows(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected a list of JSON objects, got {error}") from None
    for number, row in enumerate(rows, 1):
        where = f"{file}: row {number}"
        yield where, _object(row, where)


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _csv_rows(file: Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter)
        names = [name.strip() for name in reader.fieldnames or ()]
        again = [name for name, count in Counter(names).items() if count > 1]
        if again:
            raise ValueError(f"{file}:1: expected every column once, got {again[0]!r} again")
        reader.fieldnames = names
        for cells in reader:
            where = f"{file}:{reader.line_num}"
            if None in cells or None in cells.values():
                raise ValueError(
                    f"{where}: expected {counted(len(names), 'cell')} as in the header"
                )
            yield where, {name: _cell(name, text) for name, text in cells.items()}


def _cell(name: str, text: str) -> Any:
    """The value of a CSV cell; what is no number where one is due is refused later."""
    text = text.strip()
    if not text:
        return None
    if name == "run" or name in LABELS:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if name == "final" and text in ("0", "1"):
        return text == "1"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
