"""The table of a study: one row a checkpoint of a run, written as JSON lines, read from CSV too.

:mod:`fastdaa.study.columns` says what the columns are, :mod:`fastdaa.study.table_files` what is
read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np

from fastdaa.counted import counted
from fastdaa.study.columns import OPTIONAL, REQUIRED, Row, check_row, is_number
from fastdaa.study.curves import finals
from fastdaa.study.table_files import rows_of
from fastdaa.validation import check_choice
from fastdaa.whole_file import naming, whole_file

Paths: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class Table(Sequence[Row]):
    """Checked rows, in the order of the files. Rows are plain dictionaries; do not change them."""

    def __init__(self, rows: Iterable[Row]):
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Table: ...
    def __getitem__(self, index: int | slice) -> Row | Table:
        if isinstance(index, slice):
            return Table(self._rows[index])
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __repr__(self) -> str:
        runs = {row["run"] for row in self}
        return f"Table({counted(len(self), 'row')}, {counted(len(runs), 'run')})"

    @property
    def columns(self) -> list[str]:
        """Every column that has a value in at least one row, known ones first."""
        present = {name for row in self for name, value in row.items() if value is not None}
        return [name for name in (*REQUIRED, *OPTIONAL) if name in present] + sorted(
            present.difference(REQUIRED, OPTIONAL)
        )

    def check_score(self, action: str, score: str) -> None:
        """Raise ``ValueError`` where there are no rows, or none with a value of the score."""
        if not len(self):
            raise ValueError(f"{action}: expected at least one row, got an empty table")
        known = self.columns
        if score not in known:
            raise ValueError(
                f"score: expected a column with values ({', '.join(known)}), got {score}"
            )

    def digest(self, score: str = "score") -> str:
        """Of runs, checkpoints, KLs and scores: tells whether results are those of these rows."""
        points = sorted(
            (row["run"], row["checkpoint"], float(row["kl"]), repr(row.get(score))) for row in self
        )
        return hashlib.sha256(json.dumps(points).encode()).hexdigest()[:16]

    def where(self, condition: Callable[[Row], bool]) -> Table:
        """Rows that fulfil ``condition``."""
        return Table(row for row in self if condition(row))

    def by(self, *columns: str) -> dict[tuple[Any, ...], Table]:
        """Rows grouped by columns, sorted by their values, None last.

        Without columns it is one group with the key ``()``.

        Raises:
            ValueError: a column that no row has.
        """
        known = {name for row in self for name in row}
        for name in columns:
            if len(self) and name not in known:
                raise ValueError(
                    f"group: expected columns of the table ({', '.join(self.columns)}), got {name}"
                )
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self:
            groups.setdefault(tuple(row.get(name) for name in columns), []).append(row)
        return {key: Table(groups[key]) for key in sorted(groups, key=_sortable)}

    def final(self) -> Table:
        """The rows of :func:`fastdaa.study.curves.finals`."""
        return Table(finals(self._rows))

    def known(self, *columns: str) -> Table:
        """Rows that have a value in all of these columns; NaN is none."""
        return self.where(lambda row: all(_is_known(row.get(name)) for name in columns))

    def numbers(self, column: str) -> np.ndarray:
        """A column as fp64 ``[rows]``, NaN where it is unknown.

        Raises:
            ValueError: a value that is no number.
        """
        values = [row.get(column) for row in self]
        for row, value in zip(self, values, strict=True):
            if value is not None and not is_number(value):
                raise ValueError(f"{column} of run {row['run']}: expected numbers, got {value!r}")
        return np.array([np.nan if value is None else float(value) for value in values])


def read_table(
    paths: Paths,
    *,
    columns: Mapping[str, str] | None = None,
    score: str = "score",
    duplicates: str = "error",
) -> Table:
    """Read and check one or more tables.

    Args:
        paths: files and folders as :func:`fastdaa.study.table_files.rows_of` takes them. Half a row
            at the end of a ``.jsonl`` file is left out, with a note on stderr.
        columns: names in the files by the names here, e.g. ``{"kl": "objective/kl"}``.
        score: column that is also taken as ``score``, in the rows that have a value of it.
        duplicates: what to do with a second row of the same run and checkpoint: ``"error"``, or
            ``"last"`` to keep the later one (a resumed run that repeats its checkpoints).

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty table, or a row with a missing or impossible value; the message names
            file and line.
    """
    check_choice("duplicates", duplicates, ("error", "last"))
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    renamed = {theirs: ours for ours, theirs in (columns or {}).items()}
    kept: dict[tuple[str, int], tuple[str, Row]] = {}
    files = [Path(path) for path in paths]
    for file in files:
        for where, raw in rows_of(file):
            row = _rename(raw, renamed, where)
            if not {score, "score"} & row.keys() and score != "score":
                raise ValueError(_no_column(score, row, where))
            if row.get(score) is not None:
                row["score"] = row[score]
            row = check_row(row, where)
            key = (row["run"], row["checkpoint"])
            if key in kept and duplicates == "error":
                first = kept[key][0]
                # Folders are called `out` easily.
                hint = "" if first.startswith(str(file)) else "; two runs need names of their own"
                raise ValueError(
                    f"{where}: expected one row for each run and checkpoint, got run {key[0]!r} "
                    f"checkpoint {key[1]} again (first at {first}){hint}"
                )
            kept[key] = where, row
    if not kept:
        listed = ", ".join(map(str, files)) or "no file"
        raise ValueError(f"{listed}: expected at least one row, got an empty table")
    return Table(row for _, row in kept.values())


def append_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Append checked rows to a JSON-lines table, each line in one write.

    Several processes may append to the same file. What an interrupted process left of a last line
    is cut off first.

    Raises:
        ValueError: a row that does not fit the table; nothing is written then.
    """
    lines = [_line(row, f"row {number}") for number, row in enumerate(rows, 1)]
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    _cut_unfinished_line(file)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with naming(file):
            for line in lines:
                # A full disk takes a part of a line without an error, and refuses the rest.
                while line:
                    line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)


def write_table(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write a whole JSON-lines table, atomically.

    Raises:
        ValueError: a row that does not fit the table; nothing is written then.
    """
    content = b"".join(_line(row, f"row {number}") for number, row in enumerate(rows, 1))
    with whole_file(path) as partial:
        partial.write_bytes(content)


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _sortable(key: tuple[Any, ...]) -> list[tuple[bool, bool, Any]]:
    return [
        (value is None, not is_number(value), value if is_number(value) else str(value))
        for value in key
    ]


def _rename(raw: Mapping[str, Any], renamed: Mapping[str, str], where: str) -> Row:
    """The row under our names; a column of ours that another one replaces is dropped."""
    for theirs in renamed:
        if theirs not in raw:
            raise ValueError(_no_column(theirs, raw, where))
    taken = set(renamed.values())
    row = {name: value for name, value in raw.items() if name not in taken}
    # A source column is kept under its own name too: it may serve two purposes.
    return row | {ours: raw[theirs] for theirs, ours in renamed.items()}


def _no_column(name: str, row: Mapping[str, Any], where: str) -> str:
    return f"{where}: expected a column {name}, got the columns {', '.join(row) or 'none'}"


def _line(row: Mapping[str, Any], where: str) -> bytes:
    checked = check_row(row, where)
    ordered = {name: checked[name] for name in (*REQUIRED, *OPTIONAL) if name in checked}
    return (json.dumps(ordered | checked, allow_nan=False) + "\n").encode()


def _cut_unfinished_line(file: Path) -> None:
    """Leave the file ending in a whole line."""
    if not file.is_file() or not file.stat().st_size:
        return
    with file.open("rb+") as content:
        content.seek(-1, os.SEEK_END)
        if content.read(1) == b"\n":
            return
        content.seek(0)
        data = content.read()
        start = data.rfind(b"\n") + 1
        try:
            json.loads(data[start:])
        except ValueError:
            content.truncate(start)
        else:
            content.write(b"\n")
