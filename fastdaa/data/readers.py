"""Records of a file, one by one, each with the place it came from.

A place is ``path:line`` where lines exist and ``path: row n`` (from 1) elsewhere. A reader yields
a :class:`BadRow` in place of a record that it cannot read but can step over, and raises
:class:`DataError` where it cannot go on.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastdaa.counted import counted
from fastdaa.data.errors import BadRow, DataError, describe

Place = str
Records = Iterator[tuple[Place, Any]]
_BOM = b"\xef\xbb\xbf"
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")


def read_file(path: Path) -> Records:
    """Records of a ``.json``, ``.jsonl``, ``.ndjson``, ``.csv`` (each also ``.gz``) or
    ``.parquet`` file.

    Raises:
        DataError: an unknown kind of file, or one that is broken beyond one row.
    """
    reader = _READERS.get(kind_of(path))
    if reader is None:
        known = ", ".join(_READERS)
        raise DataError(f"{path}: expected a file that ends with one of {known} (or .gz)")
    try:
        yield from reader(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: expected a whole gzip file, got a broken one ({error})"
        ) from error


def kind_of(path: Path) -> str:
    """The suffix that says how to read ``path``, or an empty string."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":
            return ""
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else ""


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(_BOM) if number == 1 else line


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"the byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise BadRow("broken UTF-8", f"expected UTF-8 text, got {got}") from None


def _read_json_lines(path: Path) -> Records:
    for number, raw in _lines(path):
        if raw.isspace():
            continue
        record: Any
        try:
            text = _decode(raw)
            record = json.loads(text)
            record = _whole_characters(record) if _HALF_ESCAPED.search(text) else record
        except json.JSONDecodeError as error:
            got = f"broken JSON ({error.msg} at column {error.colno})"
            record = BadRow("broken JSON", f"expected one JSON object a line, got {got}")
        except BadRow as error:
            record = error
        yield f"{path}:{number}", record


def _read_json(path: Path) -> Records:
    """A list of objects, one object with such a list under ``data``, or an object a line."""
    first = next((raw for _, raw in _lines(path) if not raw.isspace()), b"")
    if first.lstrip().startswith(b"{") and _is_row(first):
        yield from _read_json_lines(path)
        return
    with _open(path) as file:
        raw = file.read().removeprefix(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        got = f"the byte 0x{raw[error.start]:02x}"
        raise DataError(f"{path}:{line}: expected UTF-8 text, got {got}") from None
    try:
        if text.lstrip().startswith("["):
            yield from _read_array(path, text)
            return
        document = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        # What follows the break cannot be told apart, so there is no stepping over it.
        got = f"broken JSON ({error.msg} at column {error.colno})"
        raise DataError(
            f"{path}:{error.lineno}: expected a JSON list of objects, got {got}"
        ) from None
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        expected = "a list of objects, an object with such a list under 'data', or an object a line"
        raise DataError(f"{path}: expected {expected}, got {describe(document)}")
    halves = _HALF_ESCAPED.search(text) is not None
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", _whole_characters(row) if halves else row


def _whole_characters(record: Any) -> Any:
    """A record of JSON, or ``BadRow`` where half of a character (a surrogate) stands alone in it.

    Such halves are left where text was cut in the middle of an emoji. JSON can escape them; UTF-8,
    and with it tokenizers and Arrow, has no place for them.
    """
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        got = f"half of a character, {error.object[error.start]!a}"
        return BadRow("broken Unicode", f"expected text that can be written as UTF-8, got {got}")
    return record


def _is_row(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and not isinstance(record.get("data"), list)


def _read_array(path: Path, text: str) -> Records:
    """Elements of a JSON list, decoded one at a time, so that each knows its line."""
    decoder = json.JSONDecoder()
    skip = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    at = skip(text, text.index("[") + 1).end()
    line, counted, halves = 1, 0, _HALF_ESCAPED.search(text) is not None
    while not text.startswith("]", at):
        line += text.count("\n", counted, at)
        counted = at
        record, at = decoder.raw_decode(text, at)
        yield f"{path}:{line}", _whole_characters(record) if halves else record
        at = skip(text, at).end()
        if text.startswith(",", at):
            at = skip(text, at + 1).end()
        elif not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)


def _read_csv(path: Path) -> Records:
    """Rows under a header line; a cell that begins like a list of messages is read as JSON."""
    line = 0

    def texts() -> Iterator[str]:
        nonlocal line
        for line, raw in _lines(path):
            try:
                yield _decode(raw)
            except BadRow as error:
                # A quoted cell may span lines: where the row ends is no longer known.
                raise DataError(f"{path}:{line}: {error}") from None

    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        rows = csv.reader(texts(), strict=True)
        header = next(rows, [])
        for cells in rows:
            if cells:
                yield f"{path}:{line}", _csv_record(header, cells)
    except csv.Error as error:
        raise DataError(f"{path}:{line}: expected CSV with a header line, got {error}") from error
    finally:
        csv.field_size_limit(limit)


def _csv_record(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        message = f"expected {counted(len(header), 'cell')} as in the header, got {len(cells)}"
        return BadRow("wrong number of cells", message)
    record: dict[str, Any] = dict(zip(header, cells, strict=True))
    for field in ("prompt", "chosen", "rejected"):
        if record.get(field, "").lstrip().startswith("[{"):
            try:
                record[field] = json.loads(record[field])
            except json.JSONDecodeError as error:
                got = f"broken JSON ({error.msg} at column {error.colno} of the cell)"
                message = f"field {field!r}: expected text or a JSON list of messages, got {got}"
                return BadRow("broken JSON", message)
    return record


def _read_parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: expected a Parquet file, got {error}") from error


_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
