"""The head's and the losses' cases under pytest-benchmark, for its tables, storage and comparisons.

    pytest benchmarks/ --benchmark-json now.json
    pytest benchmarks/ --selection cpu --device cpu -k "dpo and fastdaa"
    pytest-benchmark compare before.json now.json

Every contender passes the same gate as in ``fastdaa bench`` before it is timed: a wrong result is a
failed test without a time. pytest-benchmark times contenders one after another and not in turns, so
``fastdaa bench`` is the better judge of small differences. ``extra_info`` of the JSON has the
fields of a row.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import pytest
import torch

from fastdaa.benchmarks.cases import Case, select_cases
from fastdaa.benchmarks.contenders import ALL, Absent, Contender
from fastdaa.benchmarks.gate import Gate
from fastdaa.benchmarks.inputs import HeadInputs, make_inputs
from fastdaa.benchmarks.machine import machine
from fastdaa.benchmarks.measure import measure_peak
from fastdaa.benchmarks.rows import make_row

# What peers deprecate in each other is not this project's to mend.
pytestmark = pytest.mark.filterwarnings("ignore")
_NOT_IN_JSON = ("seconds", "time")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every contender that has something to say about a case of the selection."""
    selection = metafunc.config.getoption("--selection")
    chosen = [
        (kind, case, contender)
        for kind in ("head", "loss")
        for case in select_cases(kind, selection)
        for contender in ALL
        if kind in contender.kinds and contender.applies(case)
    ]
    names = [f"{kind}-{case.id}-{contender.name}" for kind, case, contender in chosen]
    metafunc.parametrize(("kind", "case", "contender"), chosen, ids=names)


def test_contender(
    benchmark: Any, request: pytest.FixtureRequest, kind: str, case: Case, contender: Contender
) -> None:
    """Checks one call against float64, then times the others."""
    device, seed = request.config.getoption("--device"), request.config.getoption("--seed")
    try:
        version = contender.version()
        contender.check_device(device)
    except Absent as absence:
        pytest.skip(str(absence))
    lack = contender.supports(case)
    if lack is not None:
        pytest.skip(lack)
    inputs, gate = _prepared(case, seed, device)
    run = contender.prepare(inputs)
    verdict = gate.check(run())
    # Not of the first call, which also compiles.
    outputs, peak = measure_peak(run, device)
    row = make_row(
        kind,
        case.id,
        contender.name,
        verdict.status,
        case_params={**case.params, "entropy": gate.entropy},
        version=version,
        machine=_machine(device),
        seed=seed,
        threads=torch.get_num_threads(),
        command="pytest benchmarks/",
        reason=verdict.reason,
        error=verdict.errors,
        peak_bytes=peak - outputs.gradient_bytes,
        floor=f"{contender.gemms(case)}U",
    )
    del outputs
    benchmark.group = f"{kind} {case.id}"
    benchmark.extra_info.update({k: v for k, v in row.items() if k not in _NOT_IN_JSON})
    if verdict.status != "ok":
        pytest.fail(f"WRONG: {verdict.reason}", pytrace=False)

    def call() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(call)


@lru_cache(maxsize=1)
def _prepared(case: Case, seed: int, device: str) -> tuple[HeadInputs, Gate]:
    """Inputs and truth of a case; tests come case by case, and one case at a time fits memory."""
    inputs = make_inputs(case, seed, device)
    return inputs, Gate(inputs)


@cache
def _machine(device: str) -> dict[str, Any]:
    return machine(device)
