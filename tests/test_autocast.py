"""Every path meets the autocast of its caller: policy and reference must not differ in it."""

from __future__ import annotations

import pytest
import torch

from fastdaa import LmHead, Objective, tiles, token_divergence, token_logps, token_stats
from fastdaa.outputs import TokenSelection
from fastdaa.pair_loss import pair_loss

LENGTHS = (3, 2)


def call(name, hidden, weight, targets):
    head = LmHead(weight)
    if name == "single_pass":
        selection = TokenSelection(torch.arange(5), targets, torch.tensor(LENGTHS), LENGTHS)
        return pair_loss(hidden, head, selection, Objective.parse("dpo"), ref_logps=torch.zeros(2))
    if name == "divergence":
        return token_divergence(hidden, head, hidden.detach(), head)
    if name == "stats":
        return token_stats(hidden, head, targets)
    return token_logps(hidden, weight, targets, impl=name)


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("score", None), ("stats", None), ("frozen", False), ("recompute", True),
        ("single_pass", True), ("divergence", True),
    ],
)  # fmt: skip
def test_operands_are_chosen_under_the_callers_autocast(monkeypatch, name, trained):
    seen = []

    def record(hidden_states, weight):
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch.float32

    monkeypatch.setattr(tiles, "operand_dtype", record)
    hidden = torch.randn(5, 4, requires_grad=trained is not None)
    weight = torch.randn(9, 4, requires_grad=bool(trained))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(name, hidden, weight, torch.randint(0, 9, (5,)))
    assert seen and all(seen)


@pytest.mark.parametrize(
    ("hidden", "weight", "autocast", "expected"),
    [
        pytest.param("bfloat16", "bfloat16", None, "bfloat16", id="equal"),
        pytest.param("float32", "bfloat16", None, "float32", id="mixed"),
        pytest.param("float16", "bfloat16", None, "float32", id="two-halves"),
        pytest.param("float32", "float32", "bfloat16", "bfloat16", id="autocast"),
        pytest.param("float32", "bfloat16", "float16", "float16", id="mixed-autocast"),
        pytest.param("bfloat16", "bfloat16", "float16", "float16", id="other-half"),
        pytest.param("float64", "float32", "bfloat16", "float64", id="fp64-stays-wide"),
    ],
)
def test_operands_on_a_gpu_follow_autocast(monkeypatch, hidden, weight, autocast, expected):
    """Meta tensors stand for those of a GPU, whose autocast cannot be on here."""
    asked = []
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda device: asked.append(device) or bool(autocast)
    )
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: getattr(torch, autocast))
    tensors = (torch.empty(2, 3, dtype=getattr(torch, d), device="meta") for d in (hidden, weight))
    assert tiles.operand_dtype(*tensors) == getattr(torch, expected)
    assert set(asked) == {"meta"}


def test_operands_on_cpu_are_wide_whatever_autocast_says():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            assert tiles.operand_dtype(*torch.empty(2, 3, 3, dtype=dtype)) == expected
