"""Every contender of a path by itself, in a process of its own: does it run at all?

    python -m fastdaa.benchmarks.gpu.trials --output trials.jsonl

Kernels that do not compile, hang, or take the device with them are found here, where they harm
nobody, and compiled ones are in Triton's cache for the parts that follow. Several processes run at
a time. One JSON line each says how it ended; nothing is timed or compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastdaa.benchmarks.gpu import questions as asked
from fastdaa.benchmarks.gpu.processes import written_rows

# Compiled for the same types and divisibilities as the paths' own number of tokens, in less time.
_TOKENS = 2048
SECONDS = 70.0
"""Of one trial, imports and compilers included."""
_TAIL_LINES = 12
_ABSENT = 3
_RUNS = "run "
# Said where several processes are too many for the device: its memory, or a mode for one alone.
_CROWDED = ("out of memory", "ALLOC_FAILED", "busy or unavailable")


@dataclass(frozen=True)
class Trial:
    """How a contender's process ended."""

    path: str
    contender: str
    status: str
    """``"ok"``, ``"absent"``, ``"failed"``, ``"hung"``; ``"unfinished"``: out of time, but no run
    took half of it, or too many on the device at a time: nothing is known of it.
    """
    seconds: float
    said: list[str]
    """The last lines of what it printed."""


def read_trials(path: Path) -> list[Trial]:
    """The newest trial of every contender on every path; none where there is no file."""
    found = (Trial(**row) for row in written_rows(path))
    return list({(trial.path, trial.contender): trial for trial in found}.values())


def failed_names(trials: Sequence[Trial]) -> list[str]:
    """Contenders that hung on some path, or failed on one and were right on none: an error on one
    of its paths alone ends nothing, and is a row of that path."""
    fine = {t.contender for t in trials if t.status == "ok"}
    bad = (t for t in trials if t.status in ("failed", "hung"))
    return list(
        dict.fromkeys(t.contender for t in bad if t.status == "hung" or t.contender not in fine)
    )


def run_all(wanted: Sequence[tuple[str, str]], options: argparse.Namespace) -> list[Trial]:
    """Trials of ``(path, contender)``, each appended to the output file when it ends."""
    lock = threading.Lock()
    options.output.parent.mkdir(parents=True, exist_ok=True)

    def one(path: str, name: str) -> Trial:
        trial = _run(path, name, options)
        with lock, options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
            last = "" if trial.status == "ok" or not trial.said else f": {_cause(trial.said)}"
            print(f"  {path:12} {name:32} {trial.status} {trial.seconds:.0f} s{last}", flush=True)
        return trial

    pool = ThreadPoolExecutor(options.workers)
    try:
        return [future.result() for future in [pool.submit(one, *each) for each in wanted]]
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C no other one begins


def _cause(said: Sequence[str]) -> str:
    """The line that says why; advice often comes after it."""
    return next((line for line in reversed(said) if "Error" in line), said[-1])


def _run(path: str, name: str, options: argparse.Namespace) -> Trial:
    words = ["--path", path, "--contender", name, "--size", options.size]
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, *words]
    command += ["--device", options.device]
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        killer = threading.Timer(options.seconds, process.kill)
        killer.start()
        assert process.stdout is not None
        said, step_began = deque[str](maxlen=_TAIL_LINES), math.inf
        for line in filter(None, map(str.rstrip, process.stdout)):
            said.append(line)
            if line.startswith(_RUNS):
                step_began = time.monotonic()
        code = process.wait()
        late = not killer.is_alive() and code < 0
        killer.cancel()
    status = {0: "ok", _ABSENT: "absent"}.get(code, "failed")
    if late:
        # Imports and compilers of all at once are slow; a kernel that hangs takes what is left.
        enough = time.monotonic() - step_began > options.seconds / 2
        status = "hung" if enough else "unfinished"
    elif code < 0:
        said.append(f"ended by signal {-code}")
        # The first two are said to all processes of a part whose time is up.
        status = "unfinished" if -code in (signal.SIGINT, signal.SIGTERM) else "failed"
    elif status == "failed" and any(word in line for line in said for word in _CROWDED):
        status = "unfinished"
    return Trial(path, name, status, round(time.monotonic() - began, 1), list(said))


def try_one(path: str, name: str, size: str, device: str) -> int:
    """Run a contender twice on the case of a path.

    Raises:
        ArithmeticError: a result that is not finite.
    """
    import torch

    from fastdaa.benchmarks.contenders import Absent
    from fastdaa.benchmarks.inputs import make_inputs

    case = asked.case_of(path, asked.SIZES[size].case)
    case = replace(case, tokens=min(case.tokens, _TOKENS), distribution="flat")
    contender = asked.contender(name, device)
    try:
        contender.version()
        contender.check_device(device)
    except Absent as absence:
        print(f"{absence}")
        return _ABSENT
    run = contender.prepare(make_inputs(case, 0, device))
    for number in (1, 2):
        print(f"{_RUNS}{number} begins", flush=True)
        outputs: dict[str, Any] = run()._asdict()
        # Compilers are done; what waits for the device from here on waits for its kernels.
        print(f"{_RUNS}{number} is launched", flush=True)
        for what, values in outputs.items():
            if values is not None and not bool(torch.isfinite(values).all()):
                raise ArithmeticError(f"{what}: expected finite numbers, got others")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """One trial, or all of them: 1 if one of fastdaa failed or hung."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(asked.SIZES), default="gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of one process")
    parser.add_argument("--path", choices=asked.PATHS, help="one trial: of this path")
    parser.add_argument("--contender", help="... and of this contender")
    options = parser.parse_args(argv)
    if options.contender is not None:
        return try_one(options.path, options.contender, options.size, options.device)
    if options.output is None:
        parser.error("--output: expected a file for the trials")
    wanted = [
        (path, name) for path in asked.PATHS for name in ("trl", *asked.ours(path))
    ]  # fmt: skip
    try:
        trials = run_all(wanted, options)
    except KeyboardInterrupt:
        print("interrupted: finished trials are kept")
        return 130
    bad = [
        t for t in trials if t.status in ("failed", "hung") and t.contender.startswith("fastdaa")
    ]
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
