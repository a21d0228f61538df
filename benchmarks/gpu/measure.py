"""One part of the GPU check, in a process of its own: questions in, rows and a line each out.

    python -m fastdaa.benchmarks.gpu.measure paths --output gpu_check.jsonl

Rows are appended as soon as a case is measured. The exit code is 1 if a result of fastdaa is wrong
or failed, and ``LOST`` if a contender took the device with it, or hangs: the row that says so has
``device_lost``, and the same command without that contender goes on with the rest.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fastdaa.benchmarks import wording
from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.contenders import Contender
from fastdaa.benchmarks.device_loss import device_is_lost
from fastdaa.benchmarks.flags import names, seconds
from fastdaa.benchmarks.gpu import questions as asked
from fastdaa.benchmarks.gpu.questions import Question
from fastdaa.benchmarks.machine import machine
from fastdaa.benchmarks.reading import Result
from fastdaa.benchmarks.roof import measure_roof
from fastdaa.benchmarks.rows import Row, RowFile
from fastdaa.benchmarks.side_by_side import Settings, lost_row
from fastdaa.benchmarks.sweep import measure_case

LOST = 4
# Of timed rounds; three are made however long they take.
_SECONDS_A_CASE = {"paths": 6.0, "scaling": 3.0, "vocabularies": 3.0}
# Two runs of a contender and the check of their results take a few, imports and compilers more.
_HANGS_AFTER = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a part; see the module."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = _options(words)
    torch.set_num_threads(options.threads)
    dtypes = (asked.SIZES[options.size].case.dtype, "float32")
    settings = Settings(
        "head", options.device, options.seed, options.threads, machine(options.device),
        shlex.join(["python", "-m", "fastdaa.benchmarks.gpu.measure", *words]),
        repeats=asked.SIZES[options.size].repeats, budget=_SECONDS_A_CASE[options.part],
        roof=measure_roof(options.device, dtypes if options.device == "cpu" else dtypes[:1]),
    )  # fmt: skip
    if settings.roof is not None:
        print(f"roof: {settings.roof.words}", flush=True)
    return _answer(asked.questions(options.part, options.size), options, settings)


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=asked.PARTS)
    parser.add_argument("--size", choices=tuple(asked.SIZES), default="gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--contenders", type=names, metavar="A,B", help="these only")
    parser.add_argument(
        "--budget", type=seconds, metavar="S", help="after S seconds begin no other case"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(words)


def _answer(questions: Sequence[Question], options: argparse.Namespace, settings: Settings) -> int:
    began, bad = time.monotonic(), False
    file = RowFile(options.output)
    for number, question in enumerate(questions, 1):
        if options.budget is not None and time.monotonic() - began > options.budget:
            left = ", ".join(q.case.id for q in questions[number - 1 :])
            print(f"not begun, the time was used up: {left}", flush=True)
            return 1
        where = f"{options.part} {number} of {len(questions)}, {question.case.id}"
        contenders = asked.invited(question, options.contenders, options.device)

        given = replace(settings, kind=question.kind)
        give_up = partial(_give_up, question.case, given, file)
        with _Alarm(contenders if options.device == "cuda" else (), give_up) as alarm:

            def say(text: str, where: str = where, alarm: _Alarm = alarm) -> None:
                alarm.begin(text)
                if not text.startswith("timing, round"):
                    print(f"  {where}: {text}", flush=True)

            rows = measure_case(question.case, contenders, given, file, say)
        for row in rows:
            print(f"  {line_of(row)}", flush=True)
        if any(row.get("device_lost") for row in rows) or device_is_lost(options.device):
            return LOST
        bad |= any(r["family"] == "fastdaa" and r["status"] in ("wrong", "failed") for r in rows)
    return int(bad)


class _Alarm:
    """Rings, in a thread of its own, where the step of one of some contenders takes too long.

    No exception reaches a process that waits for a kernel, but another thread can end it.
    """

    def __init__(self, contenders: Sequence[Contender], ring: Callable[[Contender], None]):
        self._by_name, self._ring = {c.name: c for c in contenders}, ring
        self._timer: threading.Timer | None = None

    def begin(self, step: str) -> None:
        """A step, called as its contender, begins now; the one before has ended."""
        self._stop()
        if step in self._by_name:
            self._timer = threading.Timer(_HANGS_AFTER, self._ring, [self._by_name[step]])
            self._timer.daemon = True
            self._timer.start()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def __enter__(self) -> _Alarm:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()


def _give_up(case: Case, settings: Settings, file: RowFile, contender: Contender) -> None:
    """End this process, whose contender hangs; a row says so."""
    reason = f"hangs: not done after {_HANGS_AFTER:.0f} s"
    print(f"  {case.id}: {contender.name} {reason}", flush=True)
    try:
        file.append([lost_row(case, contender, settings, reason)])
    finally:
        os._exit(LOST)


def line_of(row: Row) -> str:
    """A row in one line."""
    result = Result(row)
    if not result.ok:
        return f"{result.contender:32} {result.status.upper()}: {result.reason}"
    floor = "" if result.family == "floor" else f"{wording.ratio(result.over_floor)} {row['floor']}"
    return (
        f"{result.contender:32} {wording.duration(result.median):>9}  {floor:>10}  "
        f"{wording.size(result.peak):>9}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
