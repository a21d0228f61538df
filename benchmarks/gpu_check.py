"""``make gpu-check``: GPU tests and benchmarks on a CUDA machine, within eight minutes.

    python -m fastdaa.benchmarks.gpu_check --results benchmarks/results

Every part is a process with its own time limit, so that one that hangs or fails takes nothing from
the others; benchmarks write their rows as they go. The exit code is a sum that names the parts that
failed: tests 1, head 2, memory 4, accuracy 8, step 16; 0 if none did. ``--device cpu --selection
tiny`` runs the same way where there is no GPU, in some minutes and without those limits.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_INTERRUPTED = 130
# Between the first and the last word to a part that took too long: rows are written at once, but
# tables want to be printed and processes to end.
_GRACE_SECONDS = 10.0
_ALL_SECONDS = 480.0
# Dry runs where there is no GPU; the step has a selection of that name.
_TINY = {
    "head": "small-score-n512-fp32-peaked",
    "memory": "small-dpo-n256-fp32-peaked-trained-online",
    "accuracy": "tiny-logps-n1024-fp32-flat-trained",
}
_TINY_CONTENDERS = "pytorch,fastdaa-score,fastdaa-recompute"


@dataclass(frozen=True)
class Part:
    """A process, the seconds that it may take, and the rows that it writes."""

    name: str
    code: int
    command: tuple[str, ...]
    seconds: float
    rows: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: Part
    problem: str | None
    seconds: float
    statuses: dict[str, int]


def parts(device: str, selection: str, results: Path, tests: Path | None) -> list[Part]:
    """The parts of a check, the quickest answers first.

    ``tests`` is the folder of the tests, which an installed wheel does not have.
    """
    python = (sys.executable, "-m")
    found = []
    if tests is not None:
        marked = ("-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "-q")
        found.append(Part("tests", 1, (*python, "pytest", str(tests), *marked), 110.0))
    for name, code, seconds, budget in (
        ("head", 2, 100.0, "50"), ("memory", 4, 50.0, "20"), ("accuracy", 8, 60.0, "20"),
        ("step", 16, 160.0, "130"),
    ):  # fmt: skip
        rows = results / f"{name}_{device}.jsonl"
        # A part ends by itself where its budget allows; its limit is for one that hangs.
        chosen = ["--selection", selection, "--budget", budget]
        if selection == "tiny" and name in _TINY:
            chosen = ["--cases", _TINY[name], "--contenders", _TINY_CONTENDERS, "--repeats", "1"]
        command = (
            *python, "fastdaa.cli", "bench", name, *chosen, "--device", device,
            "--output", str(rows),
        )  # fmt: skip
        # A dry run is about whether parts run, not how fast.
        limit = seconds if selection != "tiny" else _ALL_SECONDS
        found.append(Part(name, code, command, limit, rows))
    return found


def run_part(part: Part, seconds: float) -> Outcome:
    """Run a part for at most so many seconds.

    Raises:
        KeyboardInterrupt: after the part was told, too.
    """
    began = time.monotonic()
    before = _statuses(part.rows)
    process = subprocess.Popen(part.command, start_new_session=True)
    try:
        code: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(process)
    problem = None
    if code is None:
        problem = f"stopped after {seconds:.0f} s"
    elif code:
        problem = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    after = _statuses(part.rows)
    new = {name: count - before.get(name, 0) for name, count in after.items()}
    return Outcome(part, problem, time.monotonic() - began, {k: v for k, v in new.items() if v})


def _end(process: subprocess.Popen[bytes]) -> None:
    """As after Ctrl-C at first, so that what is finished is shown; then for good, with children."""
    for number, seconds in ((signal.SIGINT, _GRACE_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    # Children that outlived it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _statuses(path: Path | None) -> dict[str, int]:
    """How many rows of each status a file has; half a line, as after a crash, is no row."""
    import json

    counts: dict[str, int] = {}
    if path is None or not path.exists():
        return counts
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError, KeyError):
            status = json.loads(line)["status"]
            counts[status] = counts.get(status, 0) + 1
    return counts


def check(found: Sequence[Part], all_seconds: float = _ALL_SECONDS) -> int:
    """Run all parts, print what became of each, and return the sum of those that failed."""
    began = time.monotonic()
    outcomes = []
    interrupted = False
    for part in found:
        left = all_seconds - (time.monotonic() - began)
        if left <= 0:
            outcomes.append(Outcome(part, "not started: the time was used up", 0.0, {}))
            continue
        print(f"\n== {part.name}: {' '.join(part.command)}", flush=True)
        try:
            outcomes.append(run_part(part, min(part.seconds, left)))
        except KeyboardInterrupt:
            interrupted = True
            break
    print("\nsummary", flush=True)
    for outcome in outcomes:
        rows = ", ".join(f"{count} {status}" for status, count in outcome.statuses.items())
        where = f"; rows: {rows or 'none new'} in {outcome.part.rows}" if outcome.part.rows else ""
        verdict = outcome.problem or "ok"
        print(f"  {outcome.part.name:<9} {verdict:<24} {outcome.seconds:5.0f} s{where}")
    failed = [outcome.part for outcome in outcomes if outcome.problem]
    print(f"  {time.monotonic() - began:.0f} s in all", flush=True)
    if failed:
        print(f"failed: {', '.join(part.name for part in failed)}", file=sys.stderr)
    if interrupted:
        print("interrupted: the same command continues with what is left", file=sys.stderr)
        return _INTERRUPTED
    return sum(part.code for part in failed)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the machine, then run everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--selection", choices=("gpu", "quick", "tiny"), default="gpu")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts only")
    options = parser.parse_args(argv)
    # `timeout` and schedulers say it this way: parts must not outlive this process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"expected a CUDA device, torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    tests = Path(__file__).resolve().parents[1] / "tests"
    given = (options.device, options.selection, options.results)
    found = parts(*given, tests if tests.is_dir() else None)
    unknown = set(options.only or ()) - {part.name for part in found}
    if unknown:
        known = ", ".join(part.name for part in found)
        parser.error(f"--only: expected names out of {known}, got {', '.join(sorted(unknown))}")
    chosen = [part for part in found if not options.only or part.name in options.only]
    return check(chosen, _ALL_SECONDS * (4 if options.selection == "tiny" else 1))


if __name__ == "__main__":
    raise SystemExit(main())
