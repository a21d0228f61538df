"""Losses of labelled completions: values and gradients against formulas, extremes, names."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from fastdaa.losses import Objective
from fastdaa.losses.unpaired import (
    UNPAIRED_ALIASES,
    UNPAIRED_LOSSES,
    UnpairedObjective,
    takes_unpaired,
)

RATIOS = torch.tensor([1.5, -4.0, -0.7, 2.25, 0.0], dtype=torch.float64)
LABELS = torch.tensor([True, True, False, False, True])
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.6}


def sig(x):
    return 1 / (1 + math.exp(-x))


def kto(r, desirable, z):
    x = 0.4 * (r - z) if desirable else 0.4 * (z - r)
    return 1 - sig(x), (-0.4 if desirable else 0.4) * sig(x) * sig(-x)


def bco(r, desirable, delta):
    x = 0.4 * r - delta if desirable else delta - 0.4 * r
    return -math.log(sig(x)), (-0.4 if desirable else 0.4) * sig(-x)


def apo_zero(r, desirable, _):
    # As eq. 7 of arXiv 2408.06266 has it, side by side.
    value = 1 - sig(0.4 * r) if desirable else sig(0.4 * r)
    return value, (-0.4 if desirable else 0.4) * sig(0.4 * r) * sig(-0.4 * r)


FORMS = {"kto": kto, "bco": bco, "apo_zero": apo_zero}


@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("baseline", [0.0, 1.1])
@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_value_and_gradient(name, baseline, weights):
    objective = UnpairedObjective.parse(name, beta=0.4, **weights)
    ratios = RATIOS.clone().requires_grad_()
    losses = objective(ratios, LABELS, torch.tensor(baseline, dtype=torch.float64))
    (slopes,) = torch.autograd.grad(losses.sum(), ratios)
    for place, (r, label) in enumerate(zip(RATIOS.tolist(), LABELS.tolist(), strict=True)):
        weight = weights.get("desirable_weight" if label else "undesirable_weight", 1.0)
        value, slope = FORMS[name](r, label, baseline)
        assert losses[place].item() == pytest.approx(weight * value, rel=1e-12)
        assert slopes[place].item() == pytest.approx(weight * slope, rel=1e-12)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_extremes_stay_finite(name):
    objective = UnpairedObjective.parse(name, beta=1.0)
    for size in (1e2, 1e6):
        ratios = torch.tensor([size, -size, size, -size]).requires_grad_()
        labels = torch.tensor([True, True, False, False])
        losses = objective(ratios, labels, torch.tensor(0.0))
        (slopes,) = torch.autograd.grad(losses.sum(), ratios)
        assert losses.isfinite().all() and slopes.isfinite().all()
        assert losses[0] < 1e-6 and losses[3] < 1e-6
    # In fp32, what PyTorch derives from sigmoid would be 0 here.
    ratio = torch.tensor([-20.0]).requires_grad_()
    (slope,) = torch.autograd.grad(
        objective(ratio, torch.tensor([True]), torch.tensor(0.0)).sum(), ratio
    )
    assert slope < 0


def test_on_pairs_of_apo_zero_and_bco_they_are_those_of_pairs():
    """Where each side is judged by itself, two rows are a pair."""
    from fastdaa.outputs import PairLogps

    a, b = RATIOS[:2], RATIOS[2:4]
    lengths = torch.ones(2, dtype=torch.int64)
    nothing = PairLogps(torch.zeros(2).double(), torch.zeros(2).double(), lengths, lengths)
    policy = PairLogps(a, b, lengths, lengths)
    for name, paired in (("apo_zero", "apo_zero"), ("bco", "bco_pair")):
        whole = Objective.parse(paired, beta=0.4)(policy, nothing)
        parts = UnpairedObjective.parse(name, beta=0.4)(
            torch.cat([a, b]), torch.tensor([True, True, False, False]), torch.tensor(0.0)
        )
        torch.testing.assert_close(parts.view(2, 2).sum(0), whole)


def test_names():
    assert takes_unpaired("kto") and takes_unpaired(["apo_zero_unpaired"])
    assert not takes_unpaired(["kto", "sft"]) and not takes_unpaired("dpo")
    assert UnpairedObjective.parse("apo_zero_unpaired").loss.name == "apo_zero"
    objective = UnpairedObjective.parse(["kto"], beta=None, undesirable_weight=2)
    assert objective.beta == 0.1 and objective == UnpairedObjective.parse(
        "kto", undesirable_weight=2
    )
    assert str(objective) == (
        "kto(beta=0.1, desirable_weight=1.0, undesirable_weight=2) on unpaired data"
    )
    # The key of the pair loss of this name is another one.
    assert str(Objective.parse("kto", undesirable_weight=2)) != str(objective)


def test_every_loss_is_on_the_page():
    page = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text()
    section = page.split("## Losses on unpaired data")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert rows == [*UNPAIRED_LOSSES]
    for name, loss in UNPAIRED_LOSSES.items():
        assert re.search(r"(\d{4}\.\d{5})", loss.paper)[1] in section, name
        for hyperparameter, value in loss.hyperparameters.items():
            assert f"`{hyperparameter}={value}`" in section
    for alias in UNPAIRED_ALIASES:
        assert f"`{alias}`" in section
