"""The tree with one preference pair: exact masses, what training does to them, and the command."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from fastdaa.cli import main
from fastdaa.losses import Objective
from fastdaa.study import exact
from fastdaa.study.tree import (
    LEAVES,
    PAIRS,
    TreePolicy,
    TreeSettings,
    encode,
    fine_tune,
    measure,
    run_tree,
    train_on_pair,
)
from fastdaa.study.tree_table import check_cells, describe_cells, summarise

SMALL = TreeSettings(losses=("dpo", "ipo"), betas=(0.1, 0.5), seeds=1)


@pytest.fixture(scope="module")
def small():
    return run_tree(SMALL)


def test_leaves_are_all_and_their_masses_sum_to_one():
    assert len(set(LEAVES)) == 27
    policy = TreePolicy(8, seed=3)
    logps = policy.leaf_logps(encode(*LEAVES)).detach()
    assert logps.dtype == torch.float64
    assert float(logps.exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_leaf_log_probabilities_are_those_of_the_logits():
    policy = TreePolicy(8, seed=0)
    leaves = encode("abc", "cab")
    logits = policy.head(policy(leaves)).log_softmax(-1)
    expected = logits.gather(-1, leaves[..., None]).sum(dim=(1, 2))
    torch.testing.assert_close(policy.leaf_logps(leaves), expected)
    # The root's state does not know the leaf.
    torch.testing.assert_close(policy(leaves)[0, 0], policy(leaves)[1, 0])


def test_seeds_decide_the_policy_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    one, again, other = TreePolicy(8, 0), TreePolicy(8, 0), TreePolicy(8, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.head.weight, again.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_measures_by_hand():
    policy = TreePolicy(8, seed=0)
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.zero_()
    skewed = torch.full((27,), 1 / 27, dtype=torch.float64)
    skewed[LEAVES.index("aab")] = 2 / 27
    found = measure(policy, skewed.log(), "near_duplicate")
    assert found["outside"] == pytest.approx(25 / 27)
    assert found["chosen"] == found["rejected"] == pytest.approx(1 / 27)
    assert found["kl"] == pytest.approx(-torch.tensor(2.0).log().item() / 27)
    assert found["margin"] == pytest.approx(-torch.tensor(2.0).log().item())
    assert found["largest_leaf"] not in PAIRS["near_duplicate"]


def test_fine_tuning_stops_at_the_mass():
    policy = fine_tune(TreePolicy(32, 0), "near_duplicate", SMALL)
    mass = float(policy.leaf_logps(encode("aab")).detach().exp())
    assert 0.6 <= mass < 0.75


def test_training_starts_at_the_reference_and_leaves_it_alone():
    reference = fine_tune(TreePolicy(32, 0), "near_duplicate", SMALL)
    before = copy.deepcopy(reference.state_dict())
    run = train_on_pair(
        reference, "near_duplicate", Objective.parse("dpo", beta=0.1), TreeSettings(steps=25)
    )
    assert run["start"]["kl"] == pytest.approx(0, abs=1e-12) and run["start"]["margin"] == 0
    assert run["steps"] == [0, 20, 25] and len(run["outside"]) == 3
    assert run["end"]["margin"] > 0.5
    assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())


def test_outcome_of_one_seed(small):
    assert [c["name"] for c in small["checks"] if not c["holds"]] == []
    cells = {(c["pair"], c["loss"], c["beta"]): c for c in small["table"]}
    assert len(cells) == 8 and len(small["runs"]) == 8
    near = cells["near_duplicate", "dpo", 0.1]
    assert near["end"]["outside"] > 0.99 and near["start"]["outside"] < 0.35
    assert cells["near_duplicate", "ipo", 0.5]["end"]["margin"] == pytest.approx(1.0, abs=0.02)
    # The other pair reverses the trend for DPO.
    other = [cells["different_start", "dpo", beta]["end"]["outside"] for beta in (0.1, 0.5)]
    assert other[1] > other[0] + 0.05


def test_sentences_say_that_the_pair_decides(small):
    text = " ".join(small["summary"])
    assert "in 2 of 2 losses for pair near_duplicate" in text
    assert "for pair different_start" in text


@pytest.mark.slow
def test_ordering_of_all_losses_and_betas():
    content = run_tree(TreeSettings(seeds=2))
    assert [c["detail"] for c in content["checks"] if not c["holds"]] == []
    assert {c["name"] for c in content["checks"]} == {
        "outside_rises", "chosen_falls", "outside_falls_with_beta", "ipo_least", "ipo_target",
        "trend_depends_on_the_pair",
    }  # fmt: skip


def spoilt(table, **changes):
    """The table with the end of one cell (near_duplicate, ipo, 0.5) changed."""
    table = copy.deepcopy(table)
    for cell in table:
        if (cell["pair"], cell["loss"], cell["beta"]) == ("near_duplicate", "ipo", 0.5):
            cell["end"] |= changes
    return table


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"outside": 0.1}, {"outside_rises"}),
        ({"chosen": 0.9}, {"chosen_falls"}),
        ({"outside": 1.0}, {"outside_falls_with_beta", "ipo_least"}),
        ({"margin": 1.1}, {"ipo_target"}),
    ],
    ids=lambda value: "-".join(sorted(value)),
)
def test_checks_can_fail(small, changes, failing):
    checks = check_cells(spoilt(small["table"], **changes))
    assert {check["name"] for check in checks if not check["holds"]} == failing


def test_the_reversed_trend_can_fail(small):
    table = copy.deepcopy(small["table"])
    for cell in table:
        if cell["pair"] == "different_start" and cell["beta"] == 0.5:
            cell["end"]["outside"] = 0.0
    failing = {check["name"] for check in check_cells(table) if not check["holds"]}
    assert failing == {"trend_depends_on_the_pair"}
    assert "in 2 of 2 losses for pair different_start" in " ".join(describe_cells(table))


def test_cells_are_means_over_seeds(small):
    run = small["runs"][0]
    other = copy.deepcopy(run) | {"seed": 1}
    other["end"]["outside"] = run["end"]["outside"] - 0.2
    (cell,) = summarise([run, other])
    assert cell["seeds"] == 2
    assert cell["end"]["outside"] == pytest.approx(run["end"]["outside"] - 0.1)
    assert cell["outside_range"] == [other["end"]["outside"], run["end"]["outside"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": ("far",)}, "pairs: expected some of near_duplicate"),
        ({"losses": ()}, "expected at least one loss and one beta"),
        ({"losses": ("dpoo",)}, "dpoo"),
        ({"betas": (0.0,)}, "beta of dpo"),
        ({"seeds": 0}, "expected seeds, steps and hidden of at least 1"),
        ({"sft_mass": 1.0}, "sft_mass: expected a mass between 0 and 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        TreeSettings(**settings)


def test_a_mass_that_is_out_of_reach_is_told():
    with pytest.raises(RuntimeError, match="expected a mass of"):
        fine_tune(
            TreePolicy(2, 0),
            "near_duplicate",
            TreeSettings(sft_mass=0.9999, sft_steps=5),
        )


def test_command(tmp_path, capsys):
    path = tmp_path / "new" / "tree.json"
    arguments = ["--losses", "ipo", "--betas", "0.5", "--seeds", "1", "--workers", "1"]
    assert main(["study", "tree", *arguments, "--output", str(path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    content = json.loads(path.read_text())
    assert "0.693147" in printed and "checks hold" in printed and "does not hold" not in printed
    assert content["null_space"]["equal"] and len(content["runs"]) == 2
    assert all(record["holds"] for record in content["oracles"])


def test_command_tells_what_does_not_hold(tmp_path, capsys, monkeypatch, small):
    content = {
        "null_space": exact.null_space() | {"equal": False},
        "oracles": [],
        **small,
        "checks": check_cells(spoilt(small["table"], margin=1.1)),
    }
    monkeypatch.setattr(exact, "run_exact", lambda *arguments: content)
    assert main(["study", "tree", "--output", str(tmp_path / "tree.json")]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("does not hold:") == 2 and "1.100 of 1.000" in printed


def test_command_refuses_workers_below_one(capsys):
    assert main(["study", "tree", "--workers", "0"]) == 2
    assert "--workers: expected at least 1, got 0" in capsys.readouterr().err


def test_a_folder_in_the_place_of_the_file_is_said_before_the_work(tmp_path, capsys):
    assert main(["study", "tree", "--output", str(tmp_path)]) == 2
    assert f"--output: expected a file, {tmp_path} is a folder" in capsys.readouterr().err
