"""Cases after cases to a file of rows: what head, loss, memory and accuracy have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from fastdaa.benchmarks import contenders as field
from fastdaa.benchmarks.cases import SELECTIONS, Case, select_cases
from fastdaa.benchmarks.contenders import Contender
from fastdaa.benchmarks.contenders.products import floor_sizes
from fastdaa.benchmarks.machine import machine
from fastdaa.benchmarks.progress import progress
from fastdaa.benchmarks.roof import measure_roof
from fastdaa.benchmarks.rows import Row, RowFile, make_row
from fastdaa.benchmarks.side_by_side import REFERENCE, Settings, compare, invite

# Seconds of timed rounds, all cases together, where --budget says nothing.
_BUDGETS = {"quick": 10.0, "cpu": 40.0, "gpu": 60.0, "full": 1800.0}
_REPEATS = 20


def run(kind: str, options: argparse.Namespace, *, timed: bool) -> int:
    """Measure the cases that the options ask for, keep their rows, show a table.

    Returns:
        0; 1 if a row of fastdaa is wrong or failed; 130 after Ctrl-C, with finished cases kept.

    Raises:
        ValueError: an option that fits nothing.
    """
    cases = chosen_cases(kind, options)
    contenders = select_contenders(options.contenders, kind)
    if options.list:
        _list(cases, contenders, options.device)
        return 0
    if not any(contender.applies(case) for contender in contenders for case in cases):
        raise ValueError(
            f"contenders: expected one for {', '.join(case.id for case in cases)}, got "
            f"{', '.join(contender.name for contender in contenders)}, who do other work"
        )
    torch.set_num_threads(options.threads)
    file = RowFile(options.output, fresh=options.fresh)
    rows: list[Row] = []
    try:
        settings = _settings(kind, options, cases, timed)
        _measure(cases, contenders, settings, file, rows)
    except KeyboardInterrupt:
        _show(kind, rows)
        print(f"interrupted: {file.after_an_interruption()}", file=sys.stderr)
        return 130
    _show(kind, rows)
    bad = [r for r in rows if r["family"] == "fastdaa" and r["status"] in ("wrong", "failed")]
    return 1 if bad else 0


def select_contenders(names: list[str] | None, kind: str) -> list[Contender]:
    """Contenders by name or family, in the order of ``contenders.ALL``; for None, all that are in
    this kind of benchmark. Of a family too, others than these have to be named.

    Where a contender has the name of a family, it is meant and not the family.

    Raises:
        ValueError: a name that nobody has.
    """
    if names is None:
        return [c for c in field.ALL if kind in c.kinds]
    known = [c.name for c in field.ALL]
    families = dict.fromkeys(c.family for c in field.ALL if c.family not in known)
    for name in names:
        if name not in known and name not in families:
            raise ValueError(
                f"contenders: expected some of {', '.join(known)}, or a family "
                f"({', '.join(families)}), got {name!r}"
            )
    meant = families.keys() & set(names)
    return [c for c in field.ALL if c.name in names or (c.family in meant and kind in c.kinds)]


def chosen_cases(kind: str, options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for.

    Raises:
        ValueError: names that nobody has, ``--losses`` for a kind without losses, or no case left.
    """
    everything = (case for cases in SELECTIONS[kind].values() for case in cases)
    if options.losses and not any(case.is_loss for case in everything):
        raise ValueError(f"--losses: expected no such flag, the cases of {kind} have no loss")
    cases = select_cases(
        kind, _selection(options), names=options.cases, losses=options.losses, dtype=options.dtype
    )
    if not cases:
        raise ValueError("cases: expected at least one, got none that fits all options")
    return cases


def _selection(options: argparse.Namespace) -> str:
    """A GPU does the small cases of a CPU in launches and little else."""
    return options.selection or ("gpu" if options.device == "cuda" else "quick")


def _settings(
    kind: str, options: argparse.Namespace, cases: Sequence[Case], timed: bool
) -> Settings:
    budget = options.budget or _BUDGETS[_selection(options)]
    # On CPU fastdaa's products are fp32 whatever the inputs are.
    dtypes = dict.fromkeys(case.dtype for case in cases)
    if options.device == "cpu":
        dtypes["float32"] = None
    return Settings(
        kind, options.device, options.seed, options.threads, machine(options.device),
        options.command, repeats=options.repeats or _REPEATS, budget=budget / len(cases),
        roof=measure_roof(options.device, tuple(dtypes)) if timed else None, timed=timed,
    )  # fmt: skip


def _measure(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    settings: Settings,
    file: RowFile,
    rows: list[Row],
) -> None:
    for number, case in enumerate(cases, 1):
        with progress(f"case {number} of {len(cases)}, {case.id}") as tell:
            rows += measure_case(case, contenders, settings, file, tell)


def measure_case(
    case: Case,
    contenders: Sequence[Contender],
    settings: Settings,
    file: RowFile,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Rows of a case: those that the file has, and new ones, which are appended to it.

    What is new is measured beside the reference, which speed-ups need.
    """
    old = {c.name: row for c in contenders if (row := _finished(c, case, settings, file))}
    todo = [c for c in contenders if c.applies(case) and c.name not in old]
    # Who is absent or cannot do the case gets a row, but nobody runs for it.
    able = any(invite(contender, case, settings).status == "ok" for contender in todo)
    beside = [c for c in field.ALL if c.name == REFERENCE and c.name in old and settings.timed]
    made = compare(case, [*(beside if able else ()), *todo], settings, say) if todo else []
    made = [row for row in made if row["contender"] not in old]
    file.append(made)
    floors = [] if able or not old else _finished_floors(case, settings, file)
    return [*floors, *old.values(), *made]


def _finished(contender: Contender, case: Case, settings: Settings, file: RowFile) -> Row | None:
    """The row of an earlier run, if there is one for exactly this."""
    try:
        version = contender.version()
    except field.Absent:
        return None
    return _kept(contender.name, version, case, settings, file)


def _finished_floors(case: Case, settings: Settings, file: RowFile) -> list[Row]:
    names = [f"floor-{n}u" for n in floor_sizes(case)] if settings.timed else []
    found = (_kept(name, torch.__version__, case, settings, file) for name in names)
    return [row for row in found if row is not None]


def _kept(name: str, version: str, case: Case, settings: Settings, file: RowFile) -> Row | None:
    like = make_row(
        settings.kind, case.id, name, "ok", case_params=case.params, version=version,
        machine=settings.machine, seed=settings.seed, threads=settings.threads,
        command=settings.command, settings={"repeats": settings.repeats},
    )  # fmt: skip
    return file.find(like)


def _list(cases: Sequence[Case], contenders: Sequence[Contender], device: str) -> None:
    print("cases:")
    for case in cases:
        print(f"  {case.id}")
    print("contenders:")
    for contender in contenders:
        try:
            text = contender.version()
            contender.check_device(device)
        except field.Absent as absence:
            text = f"absent: {absence}"
        print(f"  {contender.name:28} {text}")


def _show(kind: str, rows: list[Row]) -> None:
    from fastdaa.benchmarks.table import show

    show(rows, title=kind)
