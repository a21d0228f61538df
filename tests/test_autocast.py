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
