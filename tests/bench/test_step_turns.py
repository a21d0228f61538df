"""Turns of the contenders: step by step on CPU, one after another on CUDA, with a deadline."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdaa.benchmarks.step import cases, workers
from fastdaa.benchmarks.step.contenders import CONTENDERS, Contender
from fastdaa.benchmarks.step.measuring import LEAST_STEPS, measure
from fastdaa.benchmarks.step.plan import Plan
from fastdaa.benchmarks.step.workers import Worker, WorkerFailed

PAIR = [CONTENDERS["trl"], CONTENDERS["fastdaa-packed"]]


class Fake:
    """Writes down what is asked of it; fails at one word of one contender."""

    def __init__(self, contender: Contender, log: list[str], fails: str = ""):
        self.name, self.log, self.fails = contender.name.split("-")[0], log, fails
        self.log.append(f"start {self.name}")

    def _note(self, word: str) -> dict[str, Any]:
        self.log.append(f"{word} {self.name}")
        if self.fails == f"{word} {self.name}":
            raise WorkerFailed("out of memory")
        return {}

    def load(self) -> None:
        self._note("load")

    def begin(self) -> Any:
        return self._note("begin")

    def step(self) -> Any:
        return self._note("step")

    def stop(self) -> None:
        self._note("stop")


def _plan(device: str, steps: int = 1, warmup: int = 1) -> Plan:
    case = cases.resized(
        cases.SELECTIONS["tiny"][0], batch=None, steps=steps, warmup=warmup, model=None
    )
    return Plan(case, "", device, 1, 0)


def _start(log: list[str], fails: str = "") -> Callable[[Contender, Plan], Fake]:
    return lambda contender, plan: Fake(contender, log, fails)


def _silent(line: str) -> None: ...


def test_steps_alternate_on_cpu() -> None:
    log: list[str] = []
    done = list(measure(PAIR, _plan("cpu"), _silent, start=_start(log)))
    assert log == [
        "start trl", "begin trl", "start fastdaa", "begin fastdaa",
        "step trl", "step fastdaa", "step trl", "step fastdaa", "stop trl", "stop fastdaa",
    ]  # fmt: skip
    assert [len(result.reports) for result in done] == [2, 2]


def test_one_after_another_on_cuda_loading_side_by_side() -> None:
    log: list[str] = []
    before = functools.partial(log.append, "oracle")
    list(measure(PAIR, _plan("cuda"), _silent, start=_start(log), before=before))
    assert log == [
        "start trl", "start fastdaa", "oracle", "load trl", "load fastdaa",
        "begin trl", "step trl", "step trl", "stop trl",
        "begin fastdaa", "step fastdaa", "step fastdaa", "stop fastdaa",
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("word", ["begin", "step"])
def test_the_others_go_on_without_one_that_failed(device: str, word: str) -> None:
    log: list[str] = []
    done = list(measure(PAIR, _plan(device), _silent, start=_start(log, f"{word} trl")))
    assert [result.failure for result in done] == ["out of memory", None]
    assert [len(result.reports) for result in done] == [0, 2]
    assert log.count("stop trl") == log.count("stop fastdaa") == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_process_is_stopped_by_an_interruption(device: str) -> None:
    log: list[str] = []

    def tell(line: str) -> None:
        if line.startswith("step"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(measure(PAIR, _plan(device), tell, start=_start(log)))
    assert sum(line.startswith("stop") for line in log) == 2


def test_the_deadline_leaves_the_least_number_of_timed_steps() -> None:
    plan, past = _plan("cpu", steps=50, warmup=2), time.monotonic() - 1
    done = list(measure(PAIR, plan, _silent, deadline=past, start=_start([])))
    assert [len(result.reports) for result in done] == [2 + LEAST_STEPS] * 2


def test_no_contender_begins_after_the_deadline_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    log: list[str] = []
    plan = _plan("cuda", steps=50, warmup=2)
    done = list(measure(PAIR, plan, _silent, deadline=0.5, start=_start(log)))
    assert [(len(result.reports), result.skipped) for result in done] == [
        (2 + LEAST_STEPS, False), (0, True),
    ]  # fmt: skip
    assert "begin fastdaa" not in log and "stop fastdaa" in log


def _gives_up(leave: Callable[[Any], bool]) -> None:
    leave("ready")
    raise ValueError("expected something else")


def _vanishes(leave: Callable[[Any], bool]) -> None:
    import os

    leave("ready")
    os._exit(7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [(_gives_up, "ValueError: expected something else"), (_vanishes, "exit code 7")],
    ids=["exception", "dead process"],
)
def test_a_process_that_fails_says_how(
    monkeypatch: pytest.MonkeyPatch, function: Any, message: str
) -> None:
    monkeypatch.setattr(workers, "_PRELOAD", [])
    # The process finds this file's functions by the name that pytest gives it from the root.
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2])
    worker = Worker("x", function, device="cpu")
    try:
        assert worker.begin() == "ready"
        with pytest.raises(WorkerFailed, match=message):
            worker.step()
    finally:
        worker.stop()
