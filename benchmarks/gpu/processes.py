"""Parts as processes: a time limit, everything that they print, and the rows that they add."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

# Between the first and the last word to a part that took too long: rows are written at once, but
# tables want to be printed and processes to end.
_GRACE_SECONDS = 10.0
_TAIL_LINES = 20
# Of a part's limit, what its own budget leaves for the case that is running when it ends.
_BUDGET_SHARE = 0.8
# Set in some images of NVIDIA's: fp32 products would be TF32, and what is held to be exact is not.
_NOT_HANDED_DOWN = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",)


@dataclass(frozen=True)
class Part:
    """A process, the seconds that it may take, and the rows that it writes."""

    name: str
    command: tuple[str, ...]
    seconds: float
    rows: Path | None = None
    contenders: tuple[str, ...] = ()
    """Handed over as ``--contenders``, if there are any."""
    budget: bool = False
    """Whether it takes ``--budget`` and ends by itself in time."""

    def words(self, seconds: float) -> list[str]:
        """The command for a limit of so many seconds."""
        words = list(self.command)
        if self.contenders:
            words += ["--contenders", ",".join(self.contenders)]
        if self.budget:
            words += ["--budget", f"{max(seconds * _BUDGET_SHARE, 1.0):.0f}"]
        return words


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: Part
    problem: str | None
    seconds: float
    statuses: dict[str, int]
    """New rows by status."""
    code: int | None = None
    said: list[str] = field(default_factory=list)
    """The last lines that it printed."""
    lost: set[str] = field(default_factory=set)
    """Contenders that took the device with them, by its new rows."""
    interrupted: bool = False


class Log:
    """Lines to the terminal and to a file that only grows."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def line(self, text: str) -> None:
        """Print and keep a line at once."""
        print(text, flush=True)
        print(text, file=self._file, flush=True)

    def lines(self, texts: Iterable[str]) -> None:
        """Several."""
        for text in texts:
            self.line(text)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._file.close()


def run_part(part: Part, seconds: float, log: Log) -> Outcome:
    """Run a part for at most so many seconds; after Ctrl-C its outcome is ``interrupted``."""
    words = part.words(seconds)
    log.line(f"\n== {part.name}: {' '.join(words)}")
    began, before = time.monotonic(), len(written_rows(part.rows))
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_HANDED_DOWN}
    environment["PYTHONUNBUFFERED"] = "1"
    process = subprocess.Popen(
        words, start_new_session=True, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    said: deque[str] = deque(maxlen=_TAIL_LINES)
    reader = threading.Thread(target=_read, args=(process, said, log), daemon=True)
    reader.start()
    interrupted, code = False, None
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    except KeyboardInterrupt:
        interrupted = True
    finally:
        _end(process)
        reader.join(_GRACE_SECONDS)
    problem = _problem(code, seconds, interrupted)
    new = written_rows(part.rows)[before:]
    statuses: dict[str, int] = {}
    for row in new:
        statuses[row["status"]] = statuses.get(row["status"], 0) + 1
    lost = {row["contender"] for row in new if row.get("device_lost")}
    took = time.monotonic() - began
    return Outcome(part, problem, took, statuses, code, list(said), lost, interrupted)


def _problem(code: int | None, seconds: float, interrupted: bool) -> str | None:
    if interrupted:
        return "interrupted"
    if code is None:
        return f"stopped after {seconds:.0f} s"
    if code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}" if code else None


def _read(process: subprocess.Popen[str], said: deque[str], log: Log) -> None:
    assert process.stdout is not None
    # The file is closed where somebody's child held on to the pipe for too long.
    with contextlib.suppress(ValueError), process.stdout:
        for line in process.stdout:
            log.line(line.rstrip())
            if line.strip():
                said.append(line.rstrip())


def _end(process: subprocess.Popen[str]) -> None:
    """As after Ctrl-C at first, so that what is finished is shown; then for good, with children."""
    for number, seconds in ((signal.SIGINT, _GRACE_SECONDS), (signal.SIGKILL, _GRACE_SECONDS)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    # Children that outlived it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def written_rows(path: Path | None) -> list[dict[str, Any]]:
    """Rows of a file; half a line, as after a crash, is none."""
    rows: list[dict[str, Any]] = []
    if path is None or not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and "status" in row:
                rows.append(row)
    return rows
