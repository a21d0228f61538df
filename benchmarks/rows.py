"""One row: one contender on one case, as a line of JSON. Files only grow, so runs can be continued.

Fields: ``seconds`` (``median``, ``p10``, ``p90``, ``min`` of ``n`` calls), ``floor_seconds`` (the
bare products that ``floor`` counts, in the same rounds) and ``expected_seconds`` (cost_model.py, at
the ``roof`` of roof.py) in seconds; ``peak_bytes`` above inputs and returned gradients, for a step
above both models; ``error`` as gate.py and step/gate.py define it, with its ``limit``;
``speedup_over_reference``: how many times as fast as the reference; ``machine``: device, driver,
versions, commit; ``time``: when the row was made, ``run``: when its process began, both UTC. A
step's further fields are in step/rows.py.

A row's identity (:func:`row_key`) is everything that decides its numbers but chance: kind, case and
its parameters, contender and its version, seed, threads, settings, code, device and the libraries
below. A row whose identity is in the output file already is not measured again.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastdaa.whole_file import naming

KINDS = ("head", "loss", "step", "memory", "accuracy")
STATUSES = ("ok", "wrong", "absent", "failed", "skipped")
Row = dict[str, Any]

# What a reader may rely on; everything but the first six may be None.
_FIELDS = (
    "kind", "case", "case_params", "contender", "version", "status", "reason", "error", "seconds",
    "peak_bytes", "floor", "floor_seconds", "expected_seconds", "speedup_over_reference", "seed",
    "threads", "machine", "time", "run", "command",
)  # fmt: skip


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# When this process began: rows of one run met the same machine, in turns where they are timed so.
_RUN = _now()
# Of the machine, what decides a row's numbers; a contender's own version is a field of the row.
_DECISIVE = (
    "device", "driver", "commit", "changes", "torch", "triton", "transformers", "accelerate",
)  # fmt: skip


def make_row(
    kind: str,
    case: str,
    contender: str,
    status: str,
    *,
    case_params: dict[str, Any],
    version: str,
    machine: dict[str, Any],
    seed: int,
    threads: int,
    command: str,
    settings: dict[str, Any] | None = None,
    **values: Any,
) -> Row:
    """A row with every field of the schema; fields that are not given are None.

    Args:
        status: ``"ok"``; ``"wrong"``: beyond the gate's limits; ``"absent"``: not installed or not
            for this device; ``"failed"``: an exception; ``"skipped"``: cannot do this case.
        settings: what else was asked for (repeats, ...), part of the row's identity.
        values: further fields; seconds, bytes and errors as plain numbers.

    Raises:
        ValueError: an unknown kind or status, or a speed-up of a row that is not ``"ok"``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if status not in STATUSES:
        raise ValueError(f"status: expected one of {', '.join(STATUSES)}, got {status!r}")
    if status != "ok" and values.get("speedup_over_reference") is not None:
        raise ValueError(f"speedup_over_reference: expected None for status {status!r}")
    row: Row = dict.fromkeys(_FIELDS)
    row.update(
        kind=kind, case=case, case_params=case_params, contender=contender, version=version,
        status=status, seed=seed, threads=threads, machine=machine, command=command,
        settings=settings or {}, time=_now(), run=_RUN,
    )  # fmt: skip
    row.update(values)
    return row


def circumstances(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Device, code and libraries: rows that differ here are not of the same thing."""
    return tuple(map((row.get("machine") or {}).get, _DECISIVE))


def alike(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the circumstances of two rows are the same, as far as is known: nvidia-smi may have
    been too late to tell the driver of one."""
    pairs = zip(_DECISIVE, circumstances(row), circumstances(other), strict=True)
    return all(a == b or (name == "driver" and None in (a, b)) for name, a, b in pairs)


def row_key(row: Row) -> str:
    """The row's identity, as a short hash."""
    params = {k: v for k, v in (row.get("case_params") or {}).items() if k not in _MEASURED}
    parts = [
        row["kind"], row["case"], params, row["contender"], row.get("version"), row.get("seed"),
        row.get("threads"), row.get("settings") or {}, *circumstances(row),
    ]  # fmt: skip
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Parameters of a case that are known only once it has run.
_MEASURED = ("entropy",)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows, one line each, and have them on the disk when this returns.

    A row that the file breaks off in (see :func:`read_rows`) is cut away first.
    """
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in map(_finite, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a+b") as file:
        file.seek(0)
        before = file.read()
        kept = before[: len(before) - len(_cut_off(before))]
        if len(kept) < len(before):
            file.truncate(len(kept))
        if kept and not kept.endswith(b"\n"):
            lines = "\n" + lines
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Rows of a file.

    A process that is killed and a disk that is full can leave half a row at the end. It is left
    out, and a line on stderr says so.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, or a line that is no row, with file and number.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"expected a file of rows, got the folder {path}")
    if not path.exists():
        raise FileNotFoundError(f"expected a file of rows, got {path}, which does not exist")
    content = path.read_bytes()
    if half := _cut_off(content):
        content = content[: -len(half)]
        number = content.count(b"\n") + 1
        print(f"{path}:{number}: the file breaks off in this row; left out", file=sys.stderr)
    return [
        _read_row(line.decode("utf-8", "replace"), f"{path}:{number}")
        for number, line in enumerate(content.split(b"\n"), 1)
        if line.strip()
    ]


def _cut_off(content: bytes) -> bytes:
    """The beginning of a row at the end of a file; empty where the last row is whole.

    Only what begins as an object does: something else is another kind of file, and is to be kept.
    """
    last = content[content.rfind(b"\n") + 1 :]
    if not last.startswith(b"{"):
        return b""
    try:
        json.loads(last)
    except ValueError:
        return last
    return b""


# What tables and pages cannot do without, and what is an object where it is given.
_NEEDED = ("kind", "case", "contender", "status")
_NEEDED_TO_COMPARE = (
    "of", "base", "new", "base_seconds", "new_seconds", "base_peak_bytes", "new_peak_bytes",
    "ratio", "ratio_low", "ratio_high", "verdict",
)  # fmt: skip
_OBJECTS = ("case_params", "error", "seconds", "machine")


def _read_row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(_broken(line, place, "a JSON object")) from error
    found = row if isinstance(row, dict) else {}
    needed = _NEEDED + (_NEEDED_TO_COMPARE if found.get("kind") == "compare" else ())
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(_broken(line, place, f"a JSON object with {', '.join(missing)}"))
    flat = [name for name in _OBJECTS if not isinstance(found.get(name), (dict, type(None)))]
    if flat:
        raise ValueError(_broken(line, place, f"a JSON object whose {flat[0]} is one or null"))
    return found


def _broken(line: str, place: str, expected: str) -> str:
    return (
        f"{place}: expected {expected}, got {line[:60]!r}; delete that line to go on: what it held "
        "is measured again"
    )


class RowFile:
    """The output of a run: what it holds from before, and where finished rows go.

    Args:
        path: JSON lines, or None to keep nothing.
        fresh: move an older file aside (``NAME.1``, ``NAME.2``, ...) and begin anew.

    Raises:
        ValueError: a file that cannot be written, found out before anything is measured; a line
            that is no row.
    """

    def __init__(self, path: Path | None, *, fresh: bool = False):
        self.path = path
        if path is not None and fresh and path.exists():
            path.rename(_aside(path))
        if path is not None:
            _check_writable(path)
        before = read_rows(path) if path is not None else []
        # What failed or was absent may work by now.
        self.finished = {row_key(row): row for row in before if row["status"] in ("ok", "wrong")}
        self._known = {(row_key(row), row["status"], row.get("reason")) for row in before}

    def find(self, row: Row) -> Row | None:
        """The row of that identity from an earlier run."""
        return self.finished.get(row_key(row))

    def after_an_interruption(self) -> str:
        """What was kept, and how to go on."""
        if self.path is None:
            return "nothing was kept (with --output FILE, the same command would go on from here)"
        return f"{self.path} has what is finished; the same command goes on from there"

    def append(self, rows: Iterable[Row]) -> None:
        """Keep rows for good, but do not say twice that somebody is absent."""
        new = []
        for row in rows:
            key = row_key(row)
            if row["status"] in ("ok", "wrong"):
                self.finished[key] = row
            elif (key, row["status"], row.get("reason")) in self._known:
                continue
            self._known.add((key, row["status"], row.get("reason")))
            new.append(row)
        if self.path is not None and new:
            append_rows(self.path, new)


def _check_writable(path: Path) -> None:
    """Also makes the file and its folder."""
    if path.is_dir():
        raise ValueError(f"--output: expected a file of rows, got the folder {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise ValueError(
            f"--output: expected a file that can be written, got {path} ({error.strerror})"
        ) from None


def _aside(path: Path) -> Path:
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.{number}")


def _finite(value: Any) -> Any:
    """NaN and infinities as text: JSON has no other way to say them."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
