"""All contenders of a case, step by step, until the steps or the seconds are used up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastdaa.benchmarks.step.contenders import Contender
from fastdaa.benchmarks.step.plan import Plan
from fastdaa.benchmarks.step.workers import WorkerFailed

LEAST_STEPS = 3


class Runner(Protocol):
    """What is asked of a contender's process; ``workers.Worker`` is one."""

    def load(self) -> None: ...

    def begin(self) -> Any: ...

    def step(self) -> Any: ...

    def stop(self) -> None: ...


@dataclass
class Measured:
    """What one contender did."""

    contender: Contender
    setup: dict[str, Any] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    """Of all steps, warm-up included."""
    failure: str | None = None
    skipped: bool = False
    """There was no time left for it."""


Tell = Callable[[str], None]
Start = Callable[[Contender, Plan], Runner]


def measure(
    contenders: Sequence[Contender],
    plan: Plan,
    tell: Tell,
    *,
    start: Start,
    before: Callable[[], None] = lambda: None,
    deadline: float | None = None,
) -> Iterator[Measured]:
    """Contenders as they are finished: together on CPU, one after another on CUDA.

    Args:
        tell: is given a line about what runs now.
        start: makes the runner of a contender.
        before: is called before any contender uses the device, while processes load on CUDA.
        deadline: of ``time.monotonic``; after it no contender has more than ``LEAST_STEPS`` timed
            steps, and on CUDA none begins.
    """
    turns = _one_by_one if plan.device == "cuda" else _in_turns
    runners: dict[str, Runner] = {}
    try:
        yield from turns(
            [Measured(c) for c in contenders], plan, runners, tell, start, before, deadline
        )
    finally:
        for runner in runners.values():
            runner.stop()


def _in_turns(
    results: Sequence[Measured],
    plan: Plan,
    runners: dict[str, Runner],
    tell: Tell,
    start: Start,
    before: Callable[[], None],
    deadline: float | None,
) -> Iterator[Measured]:
    before()
    for result in results:  # one at a time: building models is noise, too
        tell(f"building {result.contender.name}")
        runners[result.contender.name] = start(result.contender, plan)
        _begin(result, runners)
    for step in range(plan.all_steps):
        if _over(step, plan, deadline):
            break
        for result in results:
            tell(f"step {step + 1} of {plan.all_steps}: {result.contender.name}")
            _step(result, runners)
    yield from results


def _one_by_one(
    results: Sequence[Measured],
    plan: Plan,
    runners: dict[str, Runner],
    tell: Tell,
    start: Start,
    before: Callable[[], None],
    deadline: float | None,
) -> Iterator[Measured]:
    """All processes import their libraries first, side by side; then each has the device alone."""
    for result in results:
        runners[result.contender.name] = start(result.contender, plan)
    before()
    for runner in runners.values():
        with contextlib.suppress(WorkerFailed):  # it will say so again
            runner.load()
    for result in results:
        name = result.contender.name
        if deadline is not None and time.monotonic() > deadline:
            result.skipped = True
            yield result
            continue
        tell(f"building {name}")
        _begin(result, runners)
        for step in range(plan.all_steps):
            if _over(step, plan, deadline):
                break
            tell(f"step {step + 1} of {plan.all_steps}: {name}")
            _step(result, runners)
        if name in runners:
            runners.pop(name).stop()
        yield result


def _over(step: int, plan: Plan, deadline: float | None) -> bool:
    timed = step - plan.case.warmup
    return deadline is not None and timed >= LEAST_STEPS and time.monotonic() > deadline


def _begin(result: Measured, runners: dict[str, Runner]) -> None:
    _asked(result, runners, lambda runner: result.setup.update(runner.begin()))


def _step(result: Measured, runners: dict[str, Runner]) -> None:
    _asked(result, runners, lambda runner: result.reports.append(runner.step()))


def _asked(result: Measured, runners: dict[str, Runner], ask: Callable[[Runner], None]) -> None:
    """A contender that failed is noted and left out of the turns that follow."""
    name = result.contender.name
    if name not in runners:
        return
    try:
        ask(runners[name])
    except WorkerFailed as error:
        result.failure = str(error)
        runners.pop(name).stop()
