"""The table of losses, its names, and mixtures with checked hyperparameters."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdaa.losses import (
    ALIASES,
    LOSSES,
    MARGIN_FUNCTIONS,
    Objective,
    Term,
    dpo,
    get_loss,
    implicit_rewards,
    ipo,
    sft,
)
from fastdaa.outputs import BatchTotals, PairLogps

LENGTHS = (torch.tensor([2, 5]), torch.tensor([3, 4]))
POLICY = PairLogps(torch.tensor([-3.0, -9.0]), torch.tensor([-6.0, -7.0]), *LENGTHS)
REF = PairLogps(torch.tensor([-4.0, -8.5]), torch.tensor([-5.0, -7.5]), *LENGTHS)


def test_names_are_for_parse():
    for given in ("dpo", ["dpo"], ("dpo",)):
        with pytest.raises(TypeError, match=r"expected a tuple of Terms.*Objective\.parse"):
            Objective(given)


def test_table_is_consistent():
    for name, loss in LOSSES.items():
        assert loss.name == name
        assert loss.paper
        assert loss.summary
        assert loss.fn.__doc__
    for alias, (target, defaults) in ALIASES.items():
        assert alias not in LOSSES
        assert set(defaults) <= set(LOSSES[target].hyperparameters)


def test_hyperparameters_are_those_of_the_signature():
    assert get_loss("dpo").hyperparameters == {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "length_alpha": 0.0,
        "length_norm": False,
    }
    assert get_loss("sft").hyperparameters == {}
    assert get_loss("apa").hyperparameters == {"lam": 1.0}
    assert get_loss("sft").takes_totals
    assert not get_loss("dpo").takes_totals


@pytest.mark.parametrize("name", [*LOSSES, *ALIASES])
def test_defaults_are_in_range(name):
    loss = get_loss(name)
    Term(loss, 1.0, loss.hyperparameters)


def test_aliases_with_defaults_keep_them():
    assert get_loss("hinge") is LOSSES["slic"]
    norm = get_loss("sigmoid_norm")
    assert norm.name == "sigmoid_norm"
    assert norm.hyperparameters["length_norm"] is True
    losses = Objective.parse("sigmoid_norm", beta=5.0)(POLICY, REF)
    assert torch.equal(losses, dpo(POLICY, REF, beta=5.0, length_norm=True))
    assert Objective.parse("cdpo", label_smoothing=0.2).terms[0].values["label_smoothing"] == 0.2


def test_unknown_loss_names_the_nearest():
    with pytest.raises(ValueError, match=r"got 'slic-hf' \(did you mean 'slic_hf'\?\)") as error:
        get_loss("slic-hf")
    assert all(name in str(error.value) for name in [*LOSSES, *ALIASES])


def test_apo_is_not_apa():
    with pytest.raises(ValueError, match="expected a loss name, got 'apo'"):
        get_loss("apo")


def test_single_loss_is_the_function_itself():
    objective = Objective.parse("ipo", beta=0.2, target="unified", length_norm=None)
    assert torch.equal(objective(POLICY, REF), ipo(POLICY, REF, beta=0.2, target="unified"))
    assert objective.beta == 0.2
    assert not objective.coupled
    assert not objective.has_token_level


def test_mixture_sends_each_hyperparameter_to_the_losses_that_have_it():
    objective = Objective.parse(
        ["dpo", "ipo", "sft"], weights=[1.0, 0.5, 0.2], beta=0.3, label_smoothing=0.1
    )
    totals = BatchTotals(pairs=8, chosen_tokens=100)
    expected = dpo(POLICY, REF, beta=0.3, label_smoothing=0.1) + 0.5 * ipo(POLICY, REF, beta=0.3)
    expected = expected + 0.2 * sft(POLICY, None, totals=totals)
    torch.testing.assert_close(objective(POLICY, REF, totals), expected)
    assert str(objective) == (
        "dpo(beta=0.3, label_smoothing=0.1, length_alpha=0.0, length_norm=False)"
        " + 0.5 * ipo(beta=0.3, target=standard, length_norm=False) + 0.2 * sft()"
    )


def test_chunks_with_totals_add_up_to_the_batch():
    objective = Objective.parse(["simpo", "cpo", "orpo", "sft"], beta=0.5)
    whole = objective(POLICY, None)
    totals = BatchTotals(pairs=2, chosen_tokens=7)
    parts = [
        objective(PairLogps(*(x[s] for x in POLICY)), None, totals)
        for s in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("losses", "needs_ref", "coupled"),
    [
        (["dpo", "sft"], True, False),
        (["simpo"], False, False),
        (["sft", "kto"], True, True),
        (["awr"], False, False),
    ],
    ids=["dpo+sft", "simpo", "sft+kto", "awr"],
)
def test_properties_of_mixtures(losses, needs_ref, coupled):
    objective = Objective.parse(losses)
    assert objective.needs_ref is needs_ref
    assert objective.coupled is coupled


BAD = {
    "misses-every-loss": (
        ["ipo", "sft"],
        {"label_smoothing": 0.1},
        r"got label_smoothing=0.1, which no chosen loss uses: ipo takes beta, target, length_norm; "
        r"sft takes none; label_smoothing belongs to dpo, robust",
    ),
    "unknown": ("dpo", {"betta": 0.1}, r"dpo takes beta.*; no loss has betta"),
    "unknown-none": ("dpo", {"betta": None}, "no loss has betta"),
    "beta-zero": ("dpo", {"beta": 0}, "expected beta of dpo to be a finite number > 0, got 0"),
    "beta-nan": ("dpo", {"beta": float("nan")}, "beta of dpo to be a finite number > 0, got nan"),
    "beta-inf": ("dpo", {"beta": float("inf")}, "beta of dpo to be a finite number > 0, got inf"),
    "beta-bool": ("dpo", {"beta": True}, "got True"),
    "beta-string": ("dpo", {"beta": "0.1"}, "got '0.1'"),
    "smoothing-half": ("dpo", {"label_smoothing": 0.5}, r"label_smoothing of dpo .* in \[0, 0.5\)"),
    "smoothing-negative": ("robust", {"label_smoothing": -0.1}, r"in \[0, 0.5\), got -0.1"),
    "exo-zero": ("exo_pair", {"label_smoothing": 0.0}, r"of exo_pair .* in \(0, 0.5\), got 0.0"),
    "exo-alias": ("exo", {"label_smoothing": 0.0}, r"in \(0, 0.5\), got 0.0"),
    "tau": ("discopop", {"discopop_tau": 1.5}, r"in \(0, 1\], got 1.5"),
    "flag": ("ipo", {"length_norm": 1}, "expected length_norm of ipo to be True or False, got 1"),
    "target": ("ipo", {"target": "mean"}, "to be one of standard, unified, got 'mean'"),
    "divergence": (
        "f_dpo",
        {"f_divergence_type": "js"},
        "f_divergence_type of f_dpo to be one of reverse_kl, .*got 'js'",
    ),
    "g": ("daa", {"g": "logit"}, "expected g of daa to be one of logistic.*or a pair"),
    "g-single": ("daa", {"g": (torch.exp,)}, "or a pair"),
    "alpha": ("dpo", {"length_alpha": float("inf")}, "to be a finite number, got inf"),
    "lam": ("apa", {"lam": 0.0}, "expected lam of apa_pairs to be a finite number > 0, got 0.0"),
    "weights": (
        ["dpo", "sft"],
        {"weights": [1.0]},
        "weights: expected one a loss .dpo, sft., got 1",
    ),
    "weight-negative": ("dpo", {"weights": [-1.0]}, "expected a finite weight >= 0 for dpo"),
    "weights-zero": ("dpo", {"weights": [0.0]}, "at least one loss with a weight above 0"),
    "nothing": ([], {}, "at least one loss"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    losses, arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Objective.parse(losses, **arguments)


@pytest.mark.parametrize("weights", ["ab", 2.0, {"dpo": 1.0, "sft": 2.0}, [1.0, None], ["1", 1]])
def test_weights_that_are_no_numbers_are_named(weights):
    with pytest.raises(TypeError, match=r"^(weights: expected a list of|expected a) number"):
        Objective.parse(["dpo", "sft"], weights=weights)


@pytest.mark.parametrize("losses", [{"dpo": 1.0, "sft": 0.1}, {"dpo", "sft"}], ids=["dict", "set"])
def test_losses_without_an_order_are_refused(losses):
    with pytest.raises(TypeError, match=r"^losses: expected names or custom_loss\(\.\.\.\), got "):
        Objective.parse(losses)


def test_numbers_of_numpy_are_numbers():
    given = Objective.parse(
        ["dpo", "sft"], weights=np.array([1, 2], dtype=np.float32), beta=np.float32(0.5),
        ld_alpha=np.float32(0.25),
    )  # fmt: skip
    wanted = Objective.parse(["dpo", "sft"], weights=[1.0, 2.0], beta=0.5, ld_alpha=0.25)
    assert given == wanted and str(given) == str(wanted)
    for value in (np.float32("nan"), np.int64(0)):
        with pytest.raises(ValueError, match="expected beta of dpo to be a finite number > 0"):
            Objective.parse("dpo", beta=value)


@pytest.mark.parametrize(
    "g", [*MARGIN_FUNCTIONS, MARGIN_FUNCTIONS["hinge"]], ids=[*MARGIN_FUNCTIONS, "pair"]
)
def test_daa_accepts_names_and_pairs(g):
    assert Objective.parse("daa", g=g, beta=0.2)(POLICY, REF).shape == (2,)


def test_missing_reference_is_named():
    with pytest.raises(ValueError, match="expected reference log-probabilities for dpo, got None"):
        Objective.parse(["sft", "dpo"])(POLICY, None)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "apa"])
def test_objectives_travel_between_processes(name):
    objective = Objective.parse([name, "sft"], weights=[1.0, 0.1])
    again = pickle.loads(pickle.dumps(objective))
    assert str(again) == str(objective) == str(copy.deepcopy(objective))


def test_implicit_rewards_are_sums_and_detached():
    policy = PairLogps(POLICY.chosen.clone().requires_grad_(), *POLICY[1:])
    chosen, rejected = implicit_rewards(policy, REF, 0.5)
    assert chosen.tolist() == [0.5, -0.25]
    assert rejected.tolist() == [-0.5, 0.25]
    assert not chosen.requires_grad
    chosen, rejected = implicit_rewards(policy, None, 0.5)
    assert chosen.tolist() == [-1.5, -4.5]
    assert rejected.tolist() == [-3.0, -3.5]


def test_beta_of_the_rewards():
    assert Objective.parse(["sft", "simpo"]).beta == 2.0
    assert Objective.parse("apa").beta == 1.0


def test_every_loss_and_alias_is_in_the_documentation(repository_root: Path):
    page = (repository_root / "docs" / "objectives.md").read_text(encoding="utf-8")
    # The table of pairs is the first one; that of single completions has some of its names.
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    rows = {line.split("|")[1].strip(): line for line in reversed(lines)}
    for name, loss in LOSSES.items():
        row = rows[f"`{name}`"]
        for hyperparameter, default in loss.hyperparameters.items():
            assert f"`{hyperparameter}={default}`" in row, name
        if "arXiv" in loss.paper:
            assert loss.paper.rsplit(" ", 1)[1] in row, name
    for alias, (target, _) in ALIASES.items():
        assert f"`{alias}`" in rows[f"`{target}`"], alias
