"""The step's gate: a comparison that can fail, and an oracle that owes nothing to a trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdaa.benchmarks.step import cases, gate, oracle
from fastdaa.benchmarks.step.oracle import Expected
from fastdaa.benchmarks.step.pairs import prepare
from fastdaa.benchmarks.step.plan import Plan

EXPECTED = Expected([0.7, 0.6], [2.0, 4.0])


@pytest.mark.parametrize(
    ("losses", "norms", "reason"),
    [
        ([0.7, 0.6, 9.0], [2.0, 4.0, 9.0], None),
        ([0.70009, 0.6], [2.0, 4.003], None),
        ([0.7, 0.6], [None, None], None),
        ([0.7, 0.6002], [2.0, 4.0], "loss of step 2: expected 0.6 within 0.0001, got 0.6002"),
        ([0.7, 0.6], [2.01, 4.0], "grad_norm of step 1: expected 2 within 0.001, got 2.01"),
        ([0.7, math.nan], [2.0, 4.0], "loss of step 2: expected 0.6 within 0.0001, got nan"),
        ([0.7, math.inf], [2.0, 4.0], "loss of step 2: expected 0.6 within 0.0001, got inf"),
        ([0.7, 0.6], [2.0, math.nan], "grad_norm of step 2: expected 4 within 0.001, got nan"),
        ([0.7], [2.0], "expected 2 losses, got 1"),
    ],
    ids=["same", "close", "no norms", "loss", "gradient", "nan", "inf", "nan gradient", "short"],
)
def test_verdict(losses: list[float], norms: list[Any], reason: str | None) -> None:
    got, error = gate.compare(losses, norms, EXPECTED, gate.FP32)
    assert got == reason
    assert error["limit"] == {"loss": 1e-4, "grad_norm": 1e-3}


def test_large_losses_are_compared_relatively() -> None:
    expected = Expected([25.0], [1.0])
    assert gate.compare([25.002], [1.0], expected, gate.FP32)[0] is None
    assert gate.compare([25.003], [1.0], expected, gate.FP32)[0] is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # h = (-1 + 2) - (-3 + 2) = 2; beta = 0.1.
        ("dpo", math.log1p(math.exp(-0.2))),
        ("slic", 0.8),
        # Means over 2 and 4 tokens: h = 1/2 + 1/4.
        ("ipo", (0.75 - 5.0) ** 2),
    ],
)
def test_losses_by_hand(name: str, value: float) -> None:
    own = [torch.tensor(-1.0).double(), torch.tensor(-3.0).double()]
    ref = [torch.tensor(-2.0).double(), torch.tensor(-2.0).double()]
    got = oracle._loss(name, own, ref, [[0, 0], [0, 0, 0, 0]])
    assert float(got) == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize(("loss", "first"), [("dpo", math.log(2)), ("slic", 1.0), ("ipo", 25.0)])
def test_oracle_begins_where_policy_and_reference_agree(
    tmp_path: Path, loss: str, first: float
) -> None:
    case = cases.SELECTIONS["tiny"][0]
    prepare(case, str(tmp_path), seed=0)
    plan = Plan(case, str(tmp_path), "cpu", threads=1, seed=0, loss=loss, lr=1e-2)
    found = oracle.expected(plan, ["given"])["given"]
    assert found.losses[0] == pytest.approx(first, rel=1e-12)
    assert found.losses[1] != pytest.approx(first, abs=1e-3), "the optimizer moved something"
    assert all(norm > 0 for norm in found.grad_norms)
