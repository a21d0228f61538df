"""``make gpu-check``: what a CUDA machine is to show, in one run of less than eight minutes.

    python -m fastdaa.benchmarks.gpu_check --results benchmarks/results

Every contender runs by itself first (``trials``); who hangs or always fails there is left out of
what follows: the four paths of the head against their targets, from few tokens to many, other
vocabularies, the GPU tests, accuracy, and the training step. Every part is a process with a time
limit, so that one that hangs or fails takes nothing from the others, and rows are written as they
are measured. The tables come last, those of the targets and the other limits at the very end; they
are kept in ``gpu_check.md``, which is written anew after every part, and everything that was
printed in ``gpu_check.log``. ``--tables`` prints them from the rows that there are, on any machine.

Exit codes: 0; 1 if a part failed; 2 without a device; 3 if all ran and a limit is missed or not
measured. ``--device cpu --selection tiny`` rehearses it where there is no GPU, in some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fastdaa.benchmarks.gpu.device_state import Watch, state_of_the_device
from fastdaa.benchmarks.gpu.processes import Log, Outcome, Part, run_part, written_rows

_PART_FAILED, _NO_DEVICE, _TARGET_MISSED, _INTERRUPTED = 1, 2, 3, 130
# From the start of this process; a part that is stopped then has some seconds to end, and tables
# are printed.
ALL_SECONDS = 450.0
_REHEARSAL = 4  # interpreted kernels on a CPU take longer
_RESTARTS = 3
# The contract is to be no worse than the first.
_ACCURACY = (
    "pytorch", "pytorch-fp32-logits", "trl", "fastdaa-recompute", "fastdaa-recompute-triton"
)  # fmt: skip


def parts(device: str, selection: str, results: Path, tests: Path | None) -> list[Part]:
    """The parts of a check, the weightiest answers first.

    ``tests`` is the folder of the tests, which an installed wheel does not have.
    """
    from fastdaa.benchmarks.gpu.questions import PARTS, everybody
    from fastdaa.benchmarks.gpu.trials import SECONDS

    python = (sys.executable, "-m")
    where = ("--size", selection, "--device", device, "--output")
    rows = {
        name: results / f"{name}_{device}.jsonl"
        for name in ("trials", "gpu_check", "accuracy", "step")
    }
    limit = SECONDS * (_REHEARSAL if selection == "tiny" else 1)
    trials = (*python, "fastdaa.benchmarks.gpu.trials", "--seconds", f"{limit:.0f}", *where)
    found = [Part("trials", (*trials, str(rows["trials"])), 75.0, rows["trials"])]
    for name, seconds in zip(PARTS, (85.0, 110.0, 70.0), strict=True):
        command = (*python, "fastdaa.benchmarks.gpu.measure", name, *where, str(rows["gpu_check"]))
        found.append(Part(name, command, seconds, rows["gpu_check"], everybody(), budget=True))
    marked = _gpu_tests(tests) if tests is not None else []
    if marked:
        # Verbose: where a test hangs, its name is the last word.
        flags = ("-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "-v", "--tb=short")
        words = (*python, "pytest", *map(str, marked), *flags, "--continue-on-collection-errors")
        found.append(Part("tests", words, 105.0))
    bench = (*python, "fastdaa.cli", "bench")
    small = ("--cases", "tiny-logps-n1024-fp32-flat", "--repeats", "1")
    cases = small if selection == "tiny" else ("--selection", "gpu")
    accuracy = (*bench, "accuracy", *cases, "--device", device, "--output", str(rows["accuracy"]))
    found.append(Part("accuracy", accuracy, 50.0, rows["accuracy"], _ACCURACY))
    words = ("--selection", selection, "--device", device, "--output", str(rows["step"]))
    found.append(Part("step", (*bench, "step", *words), 150.0, rows["step"], budget=True))
    return found


def _gpu_tests(folder: Path) -> list[Path]:
    """Files with tests for a GPU, the one that is about nothing else first, then the kernels'.
    Others are not even collected: they may need packages that are not here."""
    found = (p for p in folder.rglob("test_*.py") if "mark.gpu" in p.read_text(encoding="utf-8"))

    def place(path: Path) -> tuple[bool, bool, Path]:
        return path.name != "test_gpu.py", not path.name.startswith("test_kernels"), path

    return sorted(found, key=place)


def check(
    found: Sequence[Part],
    log: Log,
    all_seconds: float = ALL_SECONDS,
    *,
    after: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Run all parts one after another; what became of each, up to Ctrl-C. ``after`` each."""
    from fastdaa.benchmarks.gpu.measure import LOST
    from fastdaa.benchmarks.gpu.trials import failed_names, read_trials

    began, outcomes, left_out = time.monotonic(), list[Outcome](), set[str]()
    for part in found:
        restarts = _RESTARTS
        while True:
            left = all_seconds - (time.monotonic() - began)
            if left <= 0:
                outcomes.append(Outcome(part, "not started: the time was used up", 0.0, {}))
                break
            chosen = tuple(name for name in part.contenders if name not in left_out)
            asked = replace(part, contenders=chosen)
            outcome = run_part(asked, min(part.seconds, left), log)
            outcomes.append(outcome)
            after()
            if part.name == "trials" and part.rows is not None:
                left_out |= set(failed_names(read_trials(part.rows)))
            lost = outcome.lost - left_out
            left_out |= lost
            if outcome.interrupted:
                return outcomes
            if outcome.code != LOST or not restarts:
                break
            restarts -= 1
            without = f" by {', '.join(sorted(lost))}, left out from now on" if lost else ""
            log.line(f"the device was lost{without}: once more from where it was")
    if left_out:
        log.line(f"left out after they failed: {', '.join(sorted(left_out))}")
    return outcomes


def summarise(outcomes: Sequence[Outcome], seconds: float, log: Log) -> None:
    """What became of every part, and the last words of those that failed."""
    from fastdaa.benchmarks.gpu.trials import read_trials

    failed = [o for o in outcomes if o.problem]
    trials = next((o.part.rows for o in outcomes if o.part.name == "trials"), None)
    for trial in read_trials(trials) if trials is not None else []:
        if trial.status in ("failed", "hung"):
            log.line(f"\n{trial.contender} alone on {trial.path}: {trial.status}; its last words:")
            log.lines(f"    {line[:300]}" for line in trial.said[-6:])
    for outcome in failed:
        if outcome.part.name != "trials":
            log.line(f"\n{outcome.part.name}: {outcome.problem}; its last words:")
            log.lines(f"    {line[:300]}" for line in outcome.said[-12:])
    log.line("\nsummary")
    for outcome in outcomes:
        counts = ", ".join(f"{count} {status}" for status, count in outcome.statuses.items())
        where = (
            f"; rows: {counts or 'none new'} in {outcome.part.rows}" if outcome.part.rows else ""
        )
        said = outcome.problem or "ok"
        log.line(f"  {outcome.part.name:<12} {said:<24} {outcome.seconds:5.0f} s{where}")
    log.line(f"  {seconds:.0f} s in all")
    if failed:
        log.line(f"failed: {', '.join(dict.fromkeys(o.part.name for o in failed))}")


class Report(NamedTuple):
    """All tables of the rows that there are, and how the targets fared."""

    targets: list[str]
    """With the other limits."""
    others: list[str]
    unmet: set[str]
    """Parts of the check whose rows miss a target or another limit, or do not answer it."""


def make_report(results: Path, selection: str, device: str) -> Report | None:
    """Tables of the rows in a folder, kept in ``gpu_check.md``; None where there are no rows."""
    from fastdaa.benchmarks.gpu.answers import Answers
    from fastdaa.benchmarks.gpu.limits import other_limits
    from fastdaa.benchmarks.gpu.report import as_lines, sections

    files = [results / f"{name}_{device}.jsonl" for name in ("gpu_check", "accuracy")]
    answers = Answers((row for file in files for row in written_rows(file)), selection, device)
    if not answers.results:
        return None
    (title, targets), (others_title, limits), *others = sections(answers).items()
    first, rest = as_lines({title: targets, others_title: limits}), as_lines(dict(others))
    (results / "gpu_check.md").write_text("\n".join(first + rest) + "\n", encoding="utf-8")
    judged, verdicts = answers.judged(), other_limits(answers)
    met = [j.target.path for j in judged if j.met]
    said = f"targets met: {len(met)} of {len(judged)}{': ' * bool(met)}{', '.join(met)}"
    said += f"; other limits met: {sum(v.met for v in verdicts)} of {len(verdicts)}"
    unmet = {v.part for v in verdicts if not v.met} | set(["paths"] * (len(met) < len(judged)))
    return Report([*first, said], ["", *rest], unmet)


def show_report(results: Path, selection: str, device: str) -> int:
    """Print the tables of rows from before, which may be another machine's."""
    report = make_report(results, selection, device)
    if report is None:
        print(f"expected rows of this check in {results}, found none", file=sys.stderr)
        return _PART_FAILED
    print("\n".join([*report.others, *report.targets]))
    return _TARGET_MISSED if report.unmet else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--selection", choices=("gpu", "tiny"), default="gpu")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts only")
    parser.add_argument("--tables", action="store_true", help="print the tables of earlier runs")
    return parser


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Part]:
    tests = Path(__file__).resolve().parents[1] / "tests"
    folder = tests if tests.is_dir() else None
    found = parts(options.device, options.selection, options.results, folder)
    unknown = set(options.only or ()) - {part.name for part in found}
    if unknown:
        known = ", ".join(part.name for part in found)
        parser.error(f"--only: expected names out of {known}, got {', '.join(sorted(unknown))}")
    return [part for part in found if not options.only or part.name in options.only]


def main(argv: Sequence[str] | None = None) -> int:
    """Check the machine, then run everything."""
    began, parser = time.monotonic(), _parser()
    options = parser.parse_args(argv)
    given = (options.results, options.selection, options.device)
    if options.tables:
        return show_report(*given)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"expected a CUDA device, torch {torch.__version__} sees none", file=sys.stderr)
        return _NO_DEVICE
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # of the parts, which import Triton
    options.results.mkdir(parents=True, exist_ok=True)
    slower = _REHEARSAL if options.selection == "tiny" else 1
    chosen = [replace(part, seconds=part.seconds * slower) for part in _chosen(parser, options)]
    # This process asks the device nothing: a context of its own would lock the parts out of a GPU
    # that is for one process alone.
    watching = Watch() if options.device == "cuda" else contextlib.nullcontext()
    with Log(options.results / "gpu_check.log") as log, watching as watch:

        def note() -> Report | None:
            if watch is not None:
                log.lines(filter(None, [watch.words(), state_of_the_device()]))
            try:
                return make_report(*given)
            except Exception as error:  # the parts that are left are worth more than the tables
                log.line(f"the tables failed: {type(error).__name__}: {error}")
                return None

        log.line(f"{options.device}, torch {torch.__version__}, Python {sys.version.split()[0]}")
        note()
        left = ALL_SECONDS * slower - (time.monotonic() - began)
        outcomes = check(chosen, log, left, after=note)
        report = note()
        log.lines(report.others if report else [])
        summarise(outcomes, time.monotonic() - began, log)
        log.lines(["", *report.targets] if report else [])
        if any(outcome.interrupted for outcome in outcomes):
            log.line("interrupted: the same command continues with what is left")
            return _INTERRUPTED
    if any(outcome.problem for outcome in outcomes):
        return _PART_FAILED
    if options.selection != "gpu":
        return 0
    # Of what was asked for: parts that miss a limit or do not answer it.
    unmet = report.unmet if report else {"paths", "scaling", "accuracy"}
    return _TARGET_MISSED if unmet & {part.name for part in chosen} else 0


if __name__ == "__main__":
    # `timeout` and schedulers say it this way: parts must not outlive this process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
