"""``fastdaa bench KIND --compare REF``: is this version slower than that one?

Both versions are measured in the same run by today's benchmark code, on the same inputs, taking
turns in two processes: base, new; new, base; and so on. The processes are launched several times
(`ratio` says why). A base that lacks something a contender needs is listed as absent. The exit
code is 1 if a slowdown is certain and above ``--threshold``, or if the new version is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fastdaa.benchmarks.compare.result import Comparison, print_table
from fastdaa.benchmarks.compare.versions import Version, both, checkout
from fastdaa.benchmarks.machine import machine
from fastdaa.benchmarks.progress import progress
from fastdaa.benchmarks.rows import RowFile, append_rows
from fastdaa.counted import counted

# Modules with `comparison_jobs(options)` and `open_job(job)`: see docs/benchmarks.md.
JOBS = {kind: f"fastdaa.benchmarks.{kind}" for kind in ("head", "loss", "step")}
_ROUNDS = 7
# Calls of one measurement are repeated until they take this long: clocks and wake-ups are noise.
_LEAST_SECONDS = 0.02


def run(kind: str, options: argparse.Namespace, root: Path | None = None) -> int:
    """Measures, prints the table and keeps the rows; 0, 1 or, after Ctrl-C, 130.

    Raises:
        ValueError: a kind that cannot be compared, no checkout, an unknown commit.
    """
    if kind not in JOBS:
        raise ValueError(f"expected --compare with {', '.join(JOBS)}, got {kind}")
    root = root or checkout()
    with tempfile.TemporaryDirectory(prefix="fastdaa-compare-") as folder:
        base, new = both(root, options.compare, Path(folder))
        jobs = importlib.import_module(JOBS[kind]).comparison_jobs(options)
        if not jobs:
            raise ValueError("expected a contender and a case to compare, got none (see --list)")
        RowFile(options.output, fresh=options.fresh)  # if it cannot be written, that is said now
        results = [Comparison(kind, job, base.name, new.name) for job in jobs]
        interrupted = False
        try:
            take_turns(results, (base, new), options)
        except KeyboardInterrupt:
            # Rounds that were finished count; workers and folder are gone by the end of `with`.
            interrupted = True
    return _conclude(results, options, interrupted)


def take_turns(
    results: list[Comparison], versions: tuple[Version, Version], options: argparse.Namespace
) -> None:
    """Fills the results with rounds, launch by launch."""
    rounds = options.repeats or _ROUNDS
    for launch in range(options.launches):
        with (
            progress(f"launch {launch + 1} of {options.launches}") as tell,
            _launched(JOBS[results[0].kind], versions, options.threads) as workers,
        ):
            for number, result in enumerate(results, 1):
                tell(f"{number} of {len(results)}, {result.case}, {result.contender}")
                _measure(result, workers, rounds, launch)


def _measure(result: Comparison, workers: list[Worker], rounds: int, launch: int) -> None:
    """The rounds of one launch, unless a side cannot do the job or is wrong."""
    if result.status == "ok" and result.accept([w.ask({"open": result.job}) for w in workers]):
        # The first call of each is not counted; it tells how many calls make a measurement.
        first = [worker.ask({"calls": 1}) for worker in workers]
        if result.accept(first):
            shortest = max(min(reply["seconds"] for reply in first), 1e-9)
            calls = max(math.ceil(_LEAST_SECONDS / shortest), 1)
            result.start_launch()
            for turn in range(rounds):
                order = (0, 1) if (turn + launch) % 2 == 0 else (1, 0)
                replies = {side: workers[side].ask({"calls": calls}) for side in order}
                if not result.accept([replies[0], replies[1]]):
                    break
                result.add_round([replies[0], replies[1]])
    for worker in workers:
        worker.ask({"close": True})


class Worker:
    """One version in a process of its own (worker.py)."""

    def __init__(self, module: str, version: Version, threads: int, log: IO[bytes]):
        self.version, self.log = version, log
        environment = {
            **os.environ,
            "PYTHONPATH": str(version.folder),
            "OMP_NUM_THREADS": str(threads),
            # The one that waits for its turn must not keep a core busy.
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONHASHSEED": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastdaa.benchmarks.compare.worker", module],
            cwd=version.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # Ctrl-C is the parent's to handle.
            start_new_session=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; ``failed`` with the last words of a process that has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").split("\n")
            last = next((words for words in reversed(said) if words.strip()), "without a word")
            return {"failed": f"the process ended with {self.process.wait()}: {last.strip()}"}
        reply: dict[str, Any] = json.loads(line)
        self._check_origin(reply)
        return reply

    def _check_origin(self, reply: dict[str, Any]) -> None:
        """An installed fastdaa in the way of the right one would compare a version with itself."""
        found = reply.get("file")
        if found and not Path(found).resolve().is_relative_to(self.version.folder.resolve()):
            raise RuntimeError(
                f"{self.version.name}: expected fastdaa from {self.version.folder}, got {found}"
            )

    def stop(self) -> None:
        """Ends the process, politely first."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def _launched(
    module: str, versions: tuple[Version, Version], threads: int
) -> Iterator[list[Worker]]:
    with contextlib.ExitStack() as stack:
        workers = []
        for version in versions:
            log = stack.enter_context(tempfile.TemporaryFile())
            workers.append(Worker(module, version, threads, log))
            stack.callback(workers[-1].stop)
        yield workers


def _conclude(results: list[Comparison], options: argparse.Namespace, interrupted: bool) -> int:
    """Prints, keeps the rows, and says how it went."""
    measured = [result for result in results if result.finished]
    print_table(measured, options.threshold)
    if options.output is not None and measured:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        place = {"machine": machine(options.device), "time": now, "command": options.command}
        append_rows(options.output, [result.row(options.threshold) | place for result in measured])
    if interrupted:
        left = len(results) - len(measured)
        rest = f"; without a round: {left} of {counted(len(results), 'comparison')}" if left else ""
        print(f"interrupted: reported is what was measured until then{rest}", file=sys.stderr)
        return 130
    if all(result.status == "absent" for result in measured):
        print("nothing could be compared", file=sys.stderr)
        return 1
    return int(any(result.bad(options.threshold) for result in measured))
