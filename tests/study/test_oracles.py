"""Closed forms of tabular problems, the null space, and that their checks can fail."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastdaa.losses import Objective
from fastdaa.study import apa_oracles, oracles
from fastdaa.study.apa_oracles import apa_bandit, apa_whitened
from fastdaa.study.null_space import PAIRS, null_space, pair_matrix, policy_loss
from fastdaa.study.oracle_records import apart_record, bandit, record, vector_record


@pytest.fixture(scope="module")
def records():
    return oracles.run_oracles()


def test_every_closed_form_holds(records):
    assert [r["name"] for r in records if not r["holds"]] == []
    assert len({r["name"] for r in records}) == len(records)
    json.dumps(records, allow_nan=False)


def test_minimisers_at_beta_03_p_08_are_those_of_the_table(records):
    found = {r["name"]: round(r["got"], 2) for r in records if r["name"].startswith("margin_")}
    assert found["margin_dpo"] == 4.62
    assert found["margin_ipo"] == 1.00
    assert found["margin_ipo_target"] == 2.00
    assert found["margin_slic"] == 3.33


def test_single_pairs_stop_where_they_should(records):
    found = {r["name"]: r["got"] for r in records}
    assert found["ipo_single_pair_0.1"] == pytest.approx(5.0, abs=1e-6)
    assert 2.0 <= found["slic_single_pair_0.5"] < 2.06


def test_minimisers_of_a_reversed_preference():
    for entry in oracles.margin_minimisers(p=0.3, beta=0.5):
        assert entry["holds"], entry
        assert entry["got"] < 0


def test_apa_floor_is_the_squared_log_of_the_normaliser():
    fixed_point, floor = apa_bandit(lam=1.0)
    expected = 0.0
    for seed in range(4):
        ref_logps, rewards = bandit(seed)
        expected += math.log(float((ref_logps.exp() * rewards.exp()).sum())) ** 2 / 4
    assert floor["expected"] == pytest.approx(expected)
    assert floor["got"] == pytest.approx(expected, abs=1e-9) and floor["got"] > 0.01
    assert fixed_point["error"] < 1e-9


def test_weights_of_the_reference_would_miss_apas_fixed_point(monkeypatch):
    """Off-policy weights break the Lagrange argument: the check has to notice."""

    def off_policy(ref_logps, advantages, lam, steps=2000):
        logits = ref_logps.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logps = torch.log_softmax(logits, 0)
            loss = (ref_logps.exp() * (logps - ref_logps - advantages(logps) / lam) ** 2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return torch.log_softmax(logits.detach(), 0)

    monkeypatch.setattr(apa_oracles, "_iterate_apa", off_policy)
    assert not apa_bandit()[0]["holds"]


def test_whitening_breaks_the_anchor():
    collapsed, plain = apa_whitened()
    assert collapsed["got"] > 0.999 and plain["got"] < 0.9


def test_dpo_optimum_at_another_beta():
    optimum, other = oracles.dpo_population_optimum(beta=2.0)
    assert optimum["error"] < 1e-6
    assert other["error"] > 1e-3


def test_records_can_fail():
    assert not record("x", "x", 1.0, 1.2, 0.1)["holds"]
    a, b = torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.4])
    assert not vector_record("x", "x", a, b, 0.05)["holds"]
    assert apart_record("x", "x", a, b, 0.05)["holds"]
    assert not apart_record("x", "x", a, b, 0.2)["holds"]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
def test_null_space(loss):
    found = null_space(loss, beta=0.1)
    assert found["equal"] and (found["rank"], found["null_space"]) == (1, 2)
    assert found["policies"][2]["outside"] == pytest.approx(1.0)
    if loss == "dpo":
        assert [p["loss"] for p in found["policies"][:3]] == pytest.approx([math.log(2)] * 3)
        # h = log 2 and -log 2: the mean of log(1 + 2^-0.1) and log(1 + 2^0.1)
        by_hand = (math.log1p(2**-0.1) + math.log1p(2**0.1)) / 2
        assert found["policies"][3]["loss"] == pytest.approx(by_hand)
        assert found["higher"]


def test_pair_matrix():
    assert pair_matrix(PAIRS, 3).tolist() == [[1, -1, 0], [-1, 1, 0]]


def test_a_policy_that_prefers_one_is_not_equal():
    objective = Objective.parse("dpo", beta=1.0)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    tilted = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
    assert policy_loss(objective, tilted, uniform) > math.log(2) + 0.1
