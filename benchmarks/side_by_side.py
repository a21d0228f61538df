"""One case, all contenders: gate, memory, and times in turns, to rows."""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastdaa.benchmarks import cost_model
from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.contenders import Absent, Contender, Outputs
from fastdaa.benchmarks.contenders.products import floor_sizes, floor_times, products
from fastdaa.benchmarks.device_loss import device_is_lost
from fastdaa.benchmarks.gate import Gate
from fastdaa.benchmarks.inputs import HeadInputs, make_inputs
from fastdaa.benchmarks.measure import interleave, measure_peak, summary
from fastdaa.benchmarks.roof import Roof
from fastdaa.benchmarks.rows import Row, make_row

REFERENCE = "pytorch"
"""The contender that speed-ups are against."""


@dataclass(frozen=True)
class Settings:
    """How a run measures; the same for all of its cases."""

    kind: str
    device: str
    seed: int
    threads: int
    machine: dict[str, Any]
    command: str
    repeats: int = 20
    budget: float | None = None
    """Seconds for the timed rounds of a case, but at least three rounds."""
    roof: Roof | None = None
    timed: bool = True


@dataclass
class Entry:
    """A contender on a case, on its way to a row."""

    contender: Contender
    status: str = "ok"
    reason: str | None = None
    version: str = ""
    run: Callable[[], Outputs] | None = None
    values: dict[str, Any] = field(default_factory=dict)


def compare(
    case: Case,
    contenders: Sequence[Contender],
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Rows of the contenders that have something to say about a case, and of its floors.

    Nothing a contender does stops the others: an exception is a row with the status ``"failed"``.
    Only where it takes the device with it do the others fail, too; its row has ``device_lost``.

    Args:
        progress: told what is being done, in a few words.
    """
    entries = [invite(c, case, settings) for c in contenders if c.applies(case)]
    if not any(entry.status == "ok" for entry in entries):
        return _rows(case, entries, {}, None, settings)
    _forget_compiled()
    with _quiet():
        entropy, times = _measure(case, entries, settings, progress)
    return _rows(case, entries, times, entropy, settings)


def _measure(
    case: Case, entries: list[Entry], settings: Settings, progress: Callable[[str], None]
) -> tuple[float | None, dict[str, list[float]]]:
    """Mean entropy of the case's predictions, and seconds by name; the rest goes to the entries."""
    try:
        progress("oracle")
        inputs = make_inputs(case, settings.seed, settings.device)
        gate = Gate(inputs)
        if settings.device == "cuda":
            torch.cuda.empty_cache()  # the oracle's tiles are larger than anybody's
    except Exception as error:
        _fail_all(entries, f"the oracle failed: {_said(error)}")
        return None, {}
    for entry in entries:
        if entry.status == "ok":
            progress(entry.contender.name)
            _examine(entry, inputs, gate, settings)
            _tidy(entry, entries, settings)
    times: dict[str, list[float]] = {}
    if settings.timed and any(entry.status == "ok" for entry in entries):
        try:
            times = _time(entries, inputs, settings, progress)
        except Exception as error:  # nobody's in particular: no memory for the floors
            _fail_all(entries, f"the bare products failed: {_said(error)}")
    return gate.entropy, times


def _fail_all(entries: list[Entry], reason: str) -> None:
    for entry in entries:
        if entry.status == "ok":
            entry.status, entry.reason, entry.run = "failed", reason, None


def _forget_compiled() -> None:
    """What peers had compiled for the sizes of other cases would be made anew for any size, which
    is slower code, and after some cases not at all."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _tidy(entry: Entry, entries: list[Entry], settings: Settings) -> None:
    """The next one gets the memory. Where an error was the device's last, there is no next one, and
    nobody gets a row that would count as finished."""
    if entry.status == "failed":
        gc.collect()  # an error's frames and graphs hold on to each other, and to tensors
    if settings.device != "cuda":
        return
    if entry.status == "failed" and device_is_lost(settings.device):
        entry.values["device_lost"] = True
        _fail_all(entries, f"not measured: {entry.contender.name} lost the device")
        return
    torch.cuda.empty_cache()


def invite(contender: Contender, case: Case, settings: Settings) -> Entry:
    """A contender on a case before it runs: ``"absent"`` or ``"skipped"`` with the reason, or
    ``"ok"``."""
    try:
        version = contender.version()
        contender.check_device(settings.device)
    except Absent as absence:
        return Entry(contender, "absent", str(absence))
    lack = contender.supports(case)
    return Entry(contender, "ok" if lack is None else "skipped", lack, version)


def _examine(entry: Entry, inputs: HeadInputs, gate: Gate, settings: Settings) -> None:
    """First run: right? Second run: how much memory, and the same bits?"""
    contender = entry.contender
    try:
        run = contender.prepare(inputs)
        first = run()
        verdict = gate.check(first)
        second, peak = measure_peak(run, settings.device)
        deterministic = same_bits(first, second)
        if verdict.status == "ok" and not deterministic:
            again = gate.check(second)
            verdict = again if again.status == "wrong" else verdict
    except Exception as error:
        entry.status, entry.reason = "failed", _said(error)
    else:
        entry.status, entry.reason, entry.run = verdict.status, verdict.reason, run
        entry.values = {
            "error": verdict.errors, "peak_bytes": peak - second.gradient_bytes,
            "deterministic": deterministic, "detail": contender.detail(inputs),
        }  # fmt: skip
    first = second = None  # type: ignore[assignment]  # the next one gets their memory


def same_bits(first: Outputs, second: Outputs) -> bool:
    """Whether two runs returned exactly the same."""
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
    )


def _time(
    entries: list[Entry],
    inputs: HeadInputs,
    settings: Settings,
    progress: Callable[[str], None],
) -> dict[str, list[float]]:
    """Seconds of all that are right, and of the products; who fails here drops out."""
    asked = [""]

    def named(name: str, run: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            asked[0] = name
            return run()

        return call

    floors = {name: named(name, run) for name, run in products(inputs).items()}
    # The others have run twice by now, but on CUDA their memory was given back in between.
    warmup = int(settings.device == "cuda")
    for run in floors.values() if not warmup else ():
        run()
    while timed := {e.contender.name: e for e in entries if e.status == "ok" and e.run is not None}:
        runs = floors | {n: named(n, e.run) for n, e in timed.items() if e.run is not None}
        progress("timing")
        try:
            return interleave(
                runs, settings.device, repeats=settings.repeats, budget=settings.budget,
                warmup=warmup, seed=settings.seed,
                on_round=lambda done: progress(f"timing, round {done}"),
            )  # fmt: skip
        except Exception as error:
            if asked[0] not in timed:
                raise
            entry = timed[asked[0]]
            entry.status, entry.reason = "failed", f"while it was timed: {_said(error)}"
            _tidy(entry, entries, settings)
    return {}


def _rows(
    case: Case,
    entries: list[Entry],
    times: dict[str, list[float]],
    entropy: float | None,
    settings: Settings,
) -> list[Row]:
    seconds = {name: summary(values) for name, values in times.items()}
    reference = seconds.get(REFERENCE)
    rows = [_floor_row(case, n, times, entropy, settings) for n in floor_sizes(case) if times]
    for entry in entries:
        name, gemms = entry.contender.name, entry.contender.gemms(case)
        values = dict(entry.values)
        if name in seconds:
            floor = summary(floor_times(gemms, times))["median"]
            values.update(
                seconds=seconds[name], floor_seconds=floor,
                expected_seconds=_expected(entry.contender.cost(case, settings.device), settings),
            )  # fmt: skip
            if reference is not None:
                values["speedup_over_reference"] = reference["median"] / seconds[name]["median"]
                values["reference"] = REFERENCE
        rows.append(
            _row(case, name, entry.status, entry.version, entropy, settings,
                 family=entry.contender.family, floor=f"{gemms}U", reason=entry.reason, **values)
        )  # fmt: skip
    return rows


def lost_row(case: Case, contender: Contender, settings: Settings, reason: str) -> Row:
    """The row of a contender that takes the device with it without an error of its own."""
    return _row(
        case, contender.name, "failed", contender.version(), None, settings, reason=reason,
        family=contender.family, floor=f"{contender.gemms(case)}U", device_lost=True,
    )  # fmt: skip


def _floor_row(
    case: Case,
    gemms: int,
    times: dict[str, list[float]],
    entropy: float | None,
    settings: Settings,
) -> Row:
    gradients = case.wants_grad + case.wants_head_grad
    part = {name: values for name, values in times.items() if name.startswith("product-")}
    if gemms <= gradients:  # as far as the first products go
        part = dict(list(part.items())[:gemms])
    seconds = summary(floor_times(gemms, part))
    expected = _expected(cost_model.floor(case, gemms), settings)
    return _row(
        case, f"floor-{gemms}u", "ok", torch.__version__, entropy, settings, family="floor",
        floor=f"{gemms}U", seconds=seconds, floor_seconds=seconds["median"],
        expected_seconds=expected,
    )  # fmt: skip


def _row(
    case: Case,
    name: str,
    status: str,
    version: str,
    entropy: float | None,
    settings: Settings,
    **values: Any,
) -> Row:
    if settings.roof is not None:
        values["roof"] = asdict(settings.roof)
    return make_row(
        settings.kind, case.id, name, status, case_params={**case.params, "entropy": entropy},
        version=version, machine=settings.machine, seed=settings.seed, threads=settings.threads,
        command=settings.command, settings={"repeats": settings.repeats}, **values,
    )  # fmt: skip


def _expected(cost: cost_model.Cost | None, settings: Settings) -> float | None:
    return None if cost is None or settings.roof is None else settings.roof.seconds(cost)


def _said(error: Exception) -> str:
    """Type of an exception, its first line and, as compilers put the matter there, its last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = lines[0][:200] + (f" ... {lines[-1]}" if len(lines) > 1 else "")
    return f"{type(error).__name__}: {text}"[:400]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Peers' warnings are about their own ways, and would bury the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
