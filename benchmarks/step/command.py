"""``fastdaa bench step``: cases in, rows and tables out."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdaa.benchmarks.flags import not_negative, positive, seconds
from fastdaa.benchmarks.progress import progress
from fastdaa.benchmarks.step import cases, contenders
from fastdaa.benchmarks.step.plan import LOSSES, Plan

if TYPE_CHECKING:
    from fastdaa.benchmarks.rows import Row, RowFile
    from fastdaa.benchmarks.step.cases import Case
    from fastdaa.benchmarks.step.contenders import Contender
    from fastdaa.benchmarks.step.measuring import Start
    from fastdaa.benchmarks.step.oracle import Expected
    from fastdaa.benchmarks.step.rows import Setting

    Oracle = Callable[[Plan, Sequence[str]], dict[str, Expected]]

_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that only this benchmark has."""
    own = parser.add_argument_group("the training step")
    own.add_argument(
        "--selection",
        choices=tuple(cases.SELECTIONS),
        help="a named set of cases (default: quick, on CUDA gpu)",
    )
    own.add_argument(
        "--data",
        metavar="FILE",
        help="real preference pairs (.jsonl, .jsonl.gz, ...) instead of generated lengths",
    )
    own.add_argument("--model", metavar="NAME", help=f"one of {', '.join(cases.MODELS)}")
    own.add_argument("--steps", type=positive, metavar="N", help="timed steps of a contender")
    own.add_argument("--repeats", type=positive, metavar="N", help="another name of --steps")
    own.add_argument("--warmup", type=_count, metavar="N", help="steps before them")
    own.add_argument("--batch", type=positive, metavar="N", help="pairs of a batch")
    own.add_argument(
        "--budget",
        type=seconds,
        metavar="S",
        help="after S seconds begin no other case (on CUDA, no other contender), and stop the "
        "running one after three timed steps",
    )
    own.add_argument("--lr", type=not_negative, default=1e-5, metavar="X", help="learning rate")


def run(options: argparse.Namespace) -> int:
    """Measure what is missing in the output file; 1 if a row of fastdaa is wrong or failed.

    Raises:
        ValueError: options or data that cannot be used; nothing has been measured then.
    """
    from fastdaa.benchmarks.rows import RowFile

    chosen = chosen_cases(options)
    if options.list:
        _list(chosen)
        return 0
    for case in chosen:
        contenders.choose(options.contenders or case.contenders)
    if options.dtype is not None and options.dtype != _dtype(options.device):
        raise ValueError(
            f"--dtype: expected {_dtype(options.device)} on {options.device}, the precision that "
            f"both trainers use there, got {options.dtype}"
        )
    losses = _losses(options)
    file = RowFile(options.output, fresh=options.fresh)
    rows: list[Row] = []
    try:
        _measure_all([(case, loss) for case in chosen for loss in losses], options, file, rows)
    except KeyboardInterrupt:
        _show(rows)
        print(f"interrupted: {file.after_an_interruption()}", file=sys.stderr)
        return _INTERRUPTED
    _show(rows)
    broken = [row for row in rows if row["family"] == "fastdaa" and _is_broken(row)]
    return 1 if broken else 0


def named_cases(options: argparse.Namespace) -> list[Case]:
    """The cases of the options, in their own sizes.

    Raises:
        FileNotFoundError, ValueError: no such data; unknown names, or ``--data`` beside names.
    """
    if options.data is not None:
        if options.cases or options.selection:
            raise ValueError("--data: expected no --cases and no --selection beside it")
        if not Path(options.data).expanduser().is_file():
            raise FileNotFoundError(f"--data: expected a file of pairs, got {options.data!r}")
        return [cases.from_file(options.data, options.device)]
    return cases.choose(options.cases, options.selection, options.device)


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases of the options, with the sizes that were asked for.

    Raises:
        FileNotFoundError, ValueError: as :func:`named_cases`; an unknown model.
    """
    return [
        cases.resized(
            case, batch=options.batch, steps=options.steps or options.repeats,
            warmup=options.warmup, model=options.model,
        )
        for case in named_cases(options)
    ]  # fmt: skip


def _measure_all(
    jobs: Sequence[tuple[Case, str]],
    options: argparse.Namespace,
    file: RowFile,
    rows: list[Row],
) -> None:
    from fastdaa.benchmarks.machine import machine
    from fastdaa.benchmarks.step.accounting import measured_rate

    facts, rate = machine(options.device), measured_rate(options.device, options.threads)
    deadline = None if options.budget is None else time.monotonic() + options.budget
    for case, loss in jobs:
        with tempfile.TemporaryDirectory(prefix="fastdaa-step-") as folder:
            plan = Plan(
                case, folder, options.device, options.threads, options.seed, loss, options.lr
            )
            names = options.contenders or case.contenders
            measure_case(
                plan, contenders.choose(names), file, rows, deadline=deadline,
                facts={"machine": facts, "rate": rate, "command": options.command},
            )  # fmt: skip


def measure_case(
    plan: Plan,
    wanted: Sequence[Contender],
    file: RowFile,
    rows: list[Row],
    *,
    facts: dict[str, Any],
    deadline: float | None = None,
    start: Start | None = None,
    oracle: Oracle | None = None,
) -> None:
    """Add one row for each contender to ``rows``, and to ``file`` what is not there yet.

    Args:
        deadline: of ``time.monotonic``, see :func:`fastdaa.benchmarks.step.measuring.measure`; a
            case that begins after it is noted as skipped.
        start, oracle: make a contender's runner, and the expected losses; by default processes.
    """
    from fastdaa.benchmarks.step.measuring import measure
    from fastdaa.benchmarks.step.pairs import prepare
    from fastdaa.benchmarks.step.rows import Setting, bare_row, measured_row, order_of, skipped_row
    from fastdaa.benchmarks.step.workers import WorkerFailed, run_oracle, trainer_worker

    lengths = prepare(plan.case, plan.folder, plan.seed)
    setting = Setting(plan, lengths, **facts)
    left = _still_to_do(setting, wanted, file, rows)
    if deadline is not None and time.monotonic() > deadline:
        skipped = [skipped_row(setting, contender) for contender in left]
        file.append(skipped)
        rows.extend(skipped)
        return
    if not left:
        return
    expected: dict[str, Expected] = {}

    def ask_oracle() -> None:
        tell("oracle: the first losses by plain means")
        orders = list(dict.fromkeys(order_of(contender) for contender in left))
        expected.update((oracle or run_oracle)(plan, orders))

    with progress(plan.case.id) as tell:
        try:
            for result in measure(
                left, plan, tell, start=start or trainer_worker, before=ask_oracle,
                deadline=deadline,
            ):  # fmt: skip
                row = measured_row(setting, result, expected, _reference(setting, rows))
                file.append([row])
                rows.append(row)
        except WorkerFailed as error:  # contenders' own failures are in their results
            failed = [bare_row(setting, c, "failed", f"no oracle: {error}") for c in left]
            file.append(failed)
            rows.extend(failed)


def _still_to_do(
    setting: Setting, wanted: Sequence[Contender], file: RowFile, rows: list[Row]
) -> list[Contender]:
    """Contenders without a row; those of the file, and the absent ones, are added to ``rows``."""
    from fastdaa.benchmarks.step.rows import bare_row

    left = []
    for contender in wanted:
        reason = contender.absence(setting.plan.case, setting.plan.device)
        if reason is not None:
            rows.append(bare_row(setting, contender, "absent", reason))
            file.append(rows[-1:])
            continue
        kept = file.find(bare_row(setting, contender, "ok", None))
        if kept is None:
            left.append(contender)
        else:
            rows.append(kept)
    return left


def _reference(setting: Setting, rows: Sequence[Row]) -> Row | None:
    """The reference's row on the same case."""
    from fastdaa.benchmarks.step.rows import case_params

    params = case_params(setting.plan, setting.lengths["given"])
    found = (
        row for row in rows
        if row["contender"] == contenders.REFERENCE and row["case_params"] == params
    )  # fmt: skip
    return next(found, None)


def _show(rows: Sequence[Row]) -> None:
    if rows:
        from fastdaa.benchmarks.step.printing import show

        show(rows)


def _list(chosen: Sequence[Case]) -> None:
    for case in dict.fromkeys([*chosen, *cases.CASES.values()]):
        mark = "*" if case in chosen else " "
        print(f"{mark} {case.id}: batches of {case.batch}, {case.workload.distribution}")
        print(f"    {', '.join(case.contenders)}")
    print(f"contenders: {', '.join(contenders.CONTENDERS)}; losses: {', '.join(LOSSES)}")


def _losses(options: argparse.Namespace) -> list[str]:
    wanted = options.losses or ["dpo"]
    for name in wanted:
        if name not in LOSSES:
            raise ValueError(f"--losses: expected names out of {', '.join(LOSSES)}, got {name!r}")
    return list(wanted)


def _is_broken(row: Row) -> bool:
    return row["status"] in ("wrong", "failed")


def _dtype(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)
