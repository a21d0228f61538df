"""Verdicts follow the data: each test turns one finding round and expects another verdict."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest

from fastdaa.study.claims import CLAIMS, judge_claims
from fastdaa.study.curves import curve, hump, pearson, sweeps
from fastdaa.study.figures.correlations import clouds
from fastdaa.study.fit import FitSettings, fit_table
from fastdaa.study.laws import LAWS
from fastdaa.study.results import Results
from fastdaa.study.table import Table

synthetic = runpy.run_path(str(Path(__file__).with_name("synthetic_study.py")))


JUDGES = {claim.name: claim.judge for claim in CLAIMS}


def verdict(claim: str, results: Results) -> str:
    return JUDGES[claim](results).verdict


def measured(claim: str, results: Results) -> str:
    return JUDGES[claim](results).measured


def study(**options: Any) -> Results:
    settings = {"presets": ("H",), "seeds": 2, **options}
    return Results(rows=Table(synthetic["study_rows"](**settings)))


@pytest.fixture(scope="module")
def base() -> Results:
    return study()


FLIPS = [
    ("hump", {"seeds": 4}, "reproduced"),
    ("hump", {"falls": False}, "not reproduced"),
    ("ipo_kl", {}, "reproduced"),
    ("ipo_kl", {"ipo_nearest": False}, "not reproduced"),
    ("early_peak", {"early_peak": True}, "reproduced"),
    ("early_peak", {"falls": False, "noise": 0.0}, "not reproduced"),
    ("quarter", {"falls": False, "noise": 0.0}, "not reproduced"),
    ("r2_by_size", {}, "reproduced"),
    ("r2_by_size", {"small_model_r2": 0.0}, "not reproduced"),
    ("r2_by_budget", {}, "not reproduced"),
    ("r2_by_budget", {"r2_by_distance": -0.25}, "reproduced"),
    ("accuracy", {}, "reproduced"),
    ("accuracy", {"accuracy_slope": 0.3}, "not reproduced"),
    ("length_regularised", {"seeds": 6, "noise": 0.0}, "reproduced"),
    ("length_regularised", {"falls": False, "noise": 0.0}, "not reproduced"),
    ("length_regularised", {"regularised": False}, "no data"),
]


@pytest.mark.parametrize(
    ("claim", "options", "expected"),
    FLIPS,
    ids=[f"{claim}-{expected.replace(' ', '-')}" for claim, _, expected in FLIPS],
)
def test_verdict_follows_the_data(claim: str, options: dict[str, Any], expected: str) -> None:
    assert verdict(claim, study(**options)) == expected


def changed(results: Results, change: Any) -> Results:
    return Results(rows=Table([change(dict(row)) for row in results.rows]), fits=results.fits)


def test_larger_models(base: Results) -> None:
    assert verdict("larger_models", base) == "reproduced"
    names = {"d12": "d64", "d64": "d12"}
    swapped = changed(base, lambda row: row | {"size": names.get(row["size"], row["size"])})
    assert verdict("larger_models", swapped) == "not reproduced"


def test_quarter(base: Results) -> None:
    early = changed(base, lambda row: row | {"score": -abs(row["fraction"] - 0.25)})
    assert verdict("quarter", early) == "reproduced"
    assert "best at 20% of an epoch" in measured("quarter", early)


def test_loss_value(base: Results) -> None:
    assert verdict("loss_value", base) == "reproduced"
    telling = changed(base, lambda row: row | {"loss_value": 1 - row["score"]})
    assert verdict("loss_value", telling) == "not reproduced"


def test_ipo_losses_are_compared_in_one_unit(base: Results) -> None:
    """(h - 1 / (2 beta))^2 is mostly 1 / (4 beta^2); (2 beta h - 1)^2 can be compared."""
    rows = base.rows.where(lambda row: row["loss"] == "ipo")
    (cloud,) = (cloud for cloud in clouds(rows) if cloud.metric == "loss_value")
    ends = rows.final()
    unified = [4 * row["beta"] ** 2 * row["loss_value"] for row in ends]
    assert cloud.r == pytest.approx(pearson(unified, [row["score"] for row in ends]))
    assert max(cloud.metric_values) < 1.2
    # A table of one's own may hold another convention.
    own = [{**row, "gold": None} for row in ends]
    (raw,) = (cloud for cloud in clouds(own) if cloud.metric == "loss_value")
    assert max(raw.metric_values) > 1000


def test_likelihood(base: Results) -> None:
    assert verdict("likelihood", base) == "reproduced"
    rising = changed(base, lambda row: row | {"chosen_logratio": row["kl_forward"]})
    assert verdict("likelihood", rising) == "not reproduced"


def test_same_peak(base: Results) -> None:
    assert verdict("same_peak", base) == "reproduced"
    ipo = {"ipo": 4.0}
    apart = changed(base, lambda row: row | {"kl": row["kl"] * ipo.get(row["loss"], 1.0)})
    assert verdict("same_peak", apart) == "not reproduced"


def test_ipo_fall() -> None:
    rows = synthetic["study_rows"](presets=("H",), seeds=1, noise=0.0)
    level = [
        row | {"score": max(row["score"], 0.8)} if row["loss"] == "ipo" and row["kl"] > 1 else row
        for row in rows
    ]
    assert verdict("ipo_fall", Results(rows=Table(level))) == "reproduced"


def test_ipo_falls_least_in_the_mean_but_within_noise(base: Results) -> None:
    """Two of three seeds by 0.2 less than the others, one by 0.2 more."""
    rows = []
    for seed, less in ((0, 0.2), (1, 0.2), (2, -0.2)):
        for loss in ("dpo", "ipo"):
            for kl, score in ((0.1, 0.3), (1.0, 1.0), (4.0, 0.5)):
                rows.append(
                    {"run": f"{loss}-{kl}-{seed}", "checkpoint": 1, "kl": kl, "loss": loss,
                     "beta": 1 / kl, "seed": seed,
                     "score": score + less * (loss == "ipo" and kl == 4.0)}
                )  # fmt: skip
    noisy = Results(rows=Table(rows))
    assert verdict("ipo_fall", noisy) == "partly"
    assert measured("ipo_fall", noisy) == (
        "Loss of quality from best to farthest: DPO 0.50 and IPO 0.43; within noise of DPO."
    )
    steady = [row | {"score": row["score"] + 0.4} if row["loss"] == "ipo" and row["kl"] == 4
              and row["seed"] == 2 else row for row in rows]  # fmt: skip
    assert verdict("ipo_fall", Results(rows=Table(steady))) == "reproduced"


@pytest.mark.parametrize("preset", ["H", "M"])
def test_partly(preset: str, base: Results) -> None:
    """A hump in one preset and none in the other is neither yes nor no."""
    rows = [dict(row) for row in base.rows]
    flat = [
        {**row, "preset": "M", "run": f"M{row['run']}", "score": row["kl"], "gold": row["kl"]}
        for row in rows
    ]
    both = Results(rows=Table(rows + flat))
    assert verdict("hump", both) == "partly"
    assert f"Preset {preset}: DPO best" in measured("hump", both)


@pytest.mark.parametrize(
    ("law", "log_better", "half", "d_quadratic"),
    [
        ("log", "reproduced", "reproduced", "not reproduced"),
        ("kl", "not reproduced", "not reproduced", "reproduced"),
    ],
)
def test_laws(base: Results, law: str, log_better: str, half: str, d_quadratic: str) -> None:
    """Scores that follow a law to a hundredth make that law the winner."""

    def on_law(row: dict[str, Any]) -> dict[str, Any]:
        gain = float(LAWS[law].value(max(row["kl"], 1e-9) ** 0.5, 1.2, 0.4))
        return row | {"score": gain + 0.01 * (-1) ** row["checkpoint"]}

    rows = Table([on_law(dict(row)) for row in base.rows])
    group = ("preset", "size", "loss", "length_alpha", "seed")
    fits = fit_table(rows, FitSettings(group=group, repeats=100))
    results = Results(rows=rows, fits=fits)
    found = [verdict(name, results) for name in ("log_better", "half_rmse", "d_quadratic")]
    assert found == [log_better, half, d_quadratic]
    assert "over 6 fits" in measured("half_rmse", results)


CELLS = [
    {
        "pair": "near_duplicate",
        "loss": loss,
        "beta": beta,
        "seeds": 1,
        "start": {"outside": 0.25, "chosen": 0.6, "rejected": 0.15},
        "end": {"outside": end, "chosen": 0.0, "rejected": 0.0, "kl": 2.0, "margin": 1.0},
        "outside_range": [end, end],
    }
    for loss in ("dpo", "ipo")
    for beta, end in ((0.01, 1.0), (0.5, 0.9))
]


@pytest.mark.parametrize("claim", ["accuracy", "loss_value", "likelihood", "r2_by_budget"])
def test_few_runs_say_nothing(claim: str, base: Results) -> None:
    few = base.rows.where(lambda row: (row["beta"], row["size"], row["seed"]) == (0.005, "d32", 0))
    assert len(few.final()) == 4
    assert verdict(claim, Results(rows=few)) == "no data"


def test_tree() -> None:
    assert verdict("tree", Results(tree={"table": CELLS})) == "reproduced"
    shrunk = copy.deepcopy(CELLS)
    for cell in shrunk:
        cell["end"]["outside"] = 0.1
    assert verdict("tree", Results(tree={"table": shrunk})) == "not reproduced"
    other = [{**cell, "pair": "different_start"} for cell in shrunk]
    assert verdict("tree", Results(tree={"table": CELLS + other})) == "partly"
    one_beta = [cell for cell in CELLS if cell["beta"] == CELLS[0]["beta"]]
    found = JUDGES["tree"](Results(tree={"table": one_beta}))
    assert found.verdict == "reproduced" and "smallest beta" not in found.measured


def test_null_space() -> None:
    policies = [{"name": "uniform", "loss": 0.6931}]
    found = {"policies": policies, "equal": True, "higher": True}
    assert verdict("null_space", Results(tree={"null_space": found})) == "reproduced"
    found["equal"] = False
    assert verdict("null_space", Results(tree={"null_space": found})) == "not reproduced"


def test_without_data() -> None:
    judged = judge_claims(Results())
    assert [claim.name for claim in judged] == [claim.name for claim in CLAIMS]
    assert {claim.verdict for claim in judged} == {"no data"}
    assert all(claim.measured.startswith("Not measured: needs ") for claim in judged)


def rows_of(scores: list[list[float]]) -> list[dict[str, Any]]:
    """Finished runs at distances 1, 2, ... for each seed."""
    return [
        {"run": f"{seed}-{d}", "checkpoint": 1, "kl": float(d * d), "score": score, "beta": 1 / d,
         "seed": seed, "loss": "dpo"}
        for seed, line in enumerate(scores)
        for d, score in enumerate(line, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "interior"),
    [
        ([[0.0, 1.0, 0.5]], True),
        ([[0.0, 1.0, 2.0]], False),
        ([[2.0, 1.0, 0.0]], False),
        ([[0.0, 1.0, 0.5], [0.0, 1.0, 0.52]], True),
        # Falls of 0.5 and 0.4, nine standard errors; two seeds cannot tell.
        ([[0.0, 1.0, 0.5], [0.0, 1.0, 0.6]], False),
        # The mean falls by 0.1, the seeds by 1.1 and -0.9: noise.
        ([[0.0, 1.0, -0.1], [0.0, 1.0, 1.9]], False),
    ],
    ids=["falls", "rises", "only falls", "seeds agree", "two seeds differ", "seeds disagree"],
)
def test_hump(scores: list[list[float]], interior: bool) -> None:
    found = hump(curve(rows_of(scores)))
    assert found is not None
    assert found.interior is interior


def test_seeds_of_their_own_are_compared_by_their_means() -> None:
    best, far = rows_of([[1.0, 3.0]]), rows_of([[], [0.0, 0.0, 2.5]])[2:]
    found = hump(curve([*best, *far]))
    assert found is not None
    assert (found.fall, found.stderr) == (0.5, None)


def test_a_sweep_is_one_size_of_plain_offline_losses() -> None:
    dpo = {"preset": "H", "loss": "dpo", "size": "d32", "gold": 0.1}
    ipo = {**dpo, "loss": "ipo"}
    others = [
        {**dpo, "size": "d12"}, {**dpo, "loss": "rdpo"}, {**dpo, "length_alpha": 0.1},
        {"preset": "H", "algorithm": "apa", "size": "d32", "gold": 0.1},
    ]  # fmt: skip
    assert sweeps([dpo, *others, ipo]) == {"H": [dpo, ipo]}


def test_on_policy_runs_of_somebody_else_are_a_sweep() -> None:
    rows = [{"algorithm": "apa", "beta": 0.1}, {"algorithm": "ppo", "beta": 0.2}]
    assert sweeps(rows) == {None: rows}


def test_hump_by_hand() -> None:
    found = hump(curve(rows_of([[0.0, 1.0, 0.5], [0.0, 1.2, 0.3]])))
    assert found is not None
    assert found.best.distance == pytest.approx(2.0)
    assert found.best.score == pytest.approx(1.1)
    assert found.fall == pytest.approx(0.7)
    assert found.stderr == pytest.approx(0.2)
