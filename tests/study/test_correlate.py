"""Correlations of a table: values against scipy, scopes, what is not defined, what is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from fastdaa.cli import main
from fastdaa.study.correlate import CorrelateSettings, correlate_table
from fastdaa.study.table import Table, write_table


def rows(runs=12, checkpoints=4, seed=0):
    """Two losses and two sizes; accuracy goes with the score only between sizes."""
    generator = np.random.default_rng(seed)
    made = []
    for run in range(runs):
        loss, size = ("dpo", "ipo")[run % 2], ("d12", "d32")[run // 2 % 2]
        for checkpoint in range(checkpoints):
            kl = 0.1 + checkpoint * (1 + 0.1 * run)
            big = size == "d32"
            made.append(
                {
                    "run": f"run{run}", "checkpoint": checkpoint, "kl": kl, "loss": loss,
                    "size": size, "score": 2.0 * big + generator.normal(),
                    "accuracy": 0.5 + 0.2 * big + 0.05 * generator.normal(),
                    "loss_value": 0.7 + 0.05 * generator.normal(),
                    "chosen_logratio": 0.25 - kl, "kl_forward": kl,
                    "length_r2_samples": 0.2 + 0.1 * kl + 0.1 * (not big),
                }
            )  # fmt: skip
    return made


def find(entries, **values):
    (entry,) = [
        entry for entry in entries if all(entry[name] == value for name, value in values.items())
    ]
    return entry


def test_correlations_are_scipys():
    table = Table(rows())
    entry = find(correlate_table(table)["quality"], x="accuracy", scope="pooled")
    a, b = table.numbers("accuracy"), table.numbers("score")
    assert entry["pearson"] == pytest.approx(stats.pearsonr(a, b).statistic)
    assert entry["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert (entry["n"], entry["runs"], entry["y"]) == (48, 12, "score")


def test_losses_of_ipo_are_compared_between_betas():
    """(h - 1 / (2 beta))^2 of h = 1 at two betas; quality falls with (2 beta h - 1)^2."""
    made = [
        {"run": f"{beta}", "checkpoint": 0, "kl": 1.0, "beta": beta, "loss": "ipo",
         "loss_value": (1 - 1 / (2 * beta)) ** 2, "score": -((2 * beta - 1) ** 2)}
        for beta in (0.02, 0.05, 0.1, 0.25, 0.4)
    ]  # fmt: skip
    world = [row | {"gold": row["score"]} for row in made]
    assert find(correlate_table(Table(world))["quality"])["pearson"] == pytest.approx(-1)
    # Of a table that is not the study's, nobody knows the convention.
    (own,) = correlate_table(Table(made))["quality"]
    assert own["pearson"] > -0.95


def test_pearson_by_hand():
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-1, 1, -1, 1): 2 / sqrt(5 * 4).
    made = [
        {"run": f"{n}", "checkpoint": 0, "kl": 1.0, "score": y, "accuracy": float(n)}
        for n, y in enumerate([1.0, 3.0, 1.0, 3.0])
    ]
    (entry,) = correlate_table(Table(made))["quality"]
    assert entry["pearson"] == pytest.approx(2 / np.sqrt(20))
    # Ranks (1.5, 3.5, 1.5, 3.5) have the same deviations.
    assert entry["spearman"] == pytest.approx(2 / np.sqrt(20))


def test_a_correlation_due_to_size_is_seen_as_one():
    quality = correlate_table(Table(rows(runs=40)))["quality"]
    pooled = find(quality, x="accuracy", scope="pooled")
    assert pooled["pearson_interval"][0] > 0.2
    for size in ("d12", "d32"):
        low, high = find(quality, x="accuracy", group={"size": size})["pearson_interval"]
        assert low < 0 < high
    scopes = {entry["scope"] for entry in quality}
    assert scopes == {"pooled", "loss", "size", "loss and size"}


def test_intervals_draw_whole_runs():
    """The same checkpoint written twenty times says no more than once."""
    once = [row for row in rows() if row["checkpoint"] == 3]
    often = [row | {"checkpoint": n} for row in once for n in range(20)]
    settings = CorrelateSettings(repeats=400)
    ends = [
        find(correlate_table(Table(made), settings)["quality"], x="accuracy", scope="pooled")
        for made in (once, often)
    ]
    assert ends[0]["pearson_interval"] == pytest.approx(ends[1]["pearson_interval"])


def test_few_runs_give_no_interval():
    quality = correlate_table(Table(rows(runs=4, checkpoints=8)))
    entry = find(quality["quality"], x="accuracy", scope="pooled")
    assert entry["pearson"] is not None
    assert entry["pearson_interval"] is None and entry["spearman_interval"] is None
    assert "no interval from 4 runs (n = 32)" in quality["summary"][0]


def test_length_by_size_and_budget():
    made = rows()
    content = correlate_table(Table(made), CorrelateSettings(budgets=(1.0, 2.5)))
    size_12 = [row for row in made if row["size"] == "d12"]
    everything = find(content["length"], size="d12", kl_range=None)
    assert everything["n"] == len(size_12)
    assert everything["mean"] == pytest.approx(
        np.mean([row["length_r2_samples"] for row in size_12])
    )
    middle = find(content["length"], size="d12", kl_range=[1.0, 2.5])
    inside = [row["length_r2_samples"] for row in size_12 if 1.0 <= row["kl"] < 2.5]
    assert (middle["n"], middle["least"]) == (len(inside), min(inside))
    parts = [e["n"] for e in content["length"] if e["size"] == "d12" and e["kl_range"] is not None]
    assert sum(parts) == len(size_12) and len(parts) == 3
    trend = find(content["length_trend"], size="d32")
    assert trend["spearman"] == pytest.approx(1.0)


def test_length_by_thirds_of_the_rows():
    made = [row for row in rows() if row["size"] == "d12"]
    entries = correlate_table(Table(made))["length"]
    ends = np.quantile([row["kl"] for row in made], [1 / 3, 2 / 3])
    ranges = [e["kl_range"] for e in entries if e["kl_range"] is not None]
    assert [kl_range[1] for kl_range in ranges[:2]] == pytest.approx(list(ends))
    assert len(ranges) == 3 and ranges[2][1] > max(row["kl"] for row in made)


def test_likelihoods():
    content = correlate_table(Table(rows()))
    pooled = find(content["likelihood"], group={})
    assert pooled["slope"] == pytest.approx(-1) and pooled["intercept"] == pytest.approx(0.25)
    assert pooled["gap"] == pytest.approx(0.25)
    assert pooled["pearson"] == pytest.approx(-1)
    # Only the first checkpoint, at KL 0.1, has a positive log-ratio.
    assert pooled["chosen_below_zero"] == 0.75
    assert pooled["rejected_below_zero"] is None
    assert len(content["likelihood"]) == 3


def test_only_final_checkpoints():
    content = correlate_table(Table(rows()), CorrelateSettings(final_only=True))
    assert find(content["quality"], x="accuracy", scope="pooled")["n"] == 12


NOT_DEFINED = {
    "constant": (lambda row: row | {"accuracy": 0.7}, "accuracy is the same in all rows"),
    "constant score": (lambda row: row | {"score": 1.0}, "score is the same in all rows"),
    "too few": (
        lambda row: row if row["run"] == "run0" and row["checkpoint"] else row | {"accuracy": None},
        "expected at least 4 rows with both, got 3",
    ),
}


@pytest.mark.parametrize("case", NOT_DEFINED)
def test_what_is_not_defined_has_a_reason(case):
    change, reason = NOT_DEFINED[case]
    content = correlate_table(Table([change(row) for row in rows()]))
    entry = find(content["quality"], x="accuracy", scope="pooled")
    assert entry["pearson"] is None and entry["spearman_interval"] is None
    assert entry["reason"] == reason
    assert f"not defined ({reason})" in " ".join(content["summary"])
    json.dumps(content, allow_nan=False)


def test_sentences():
    text = " ".join(correlate_table(Table(rows(runs=40)))["summary"])
    assert "implicit-reward accuracy and score, all rows together: r = +0." in text
    assert "excludes 0" in text and "includes 0" in text
    assert "size d12: length_r2_samples rises with KL (rank correlation +1.00" in text
    assert "Chosen log-ratio, all rows: below 0 in 75% of 160 rows, r = -1.00" in text


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        ([], {}, "expected at least one row, got an empty table"),
        (rows(), {"score": "gold"}, "score: expected a column with values"),
        (
            [{"run": "a", "checkpoint": 0, "kl": 1.0, "score": 1.0}],
            {},
            "expected at least one of the columns accuracy, loss_value",
        ),
    ],
    ids=["empty", "no such score", "nothing to correlate"],
)
def test_tables_without_what_is_asked_for(made, settings, message):
    with pytest.raises(ValueError, match=message):
        correlate_table(Table(made), CorrelateSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": (2.0, 1.0)}, "budgets: expected rising KLs"),
        ({"budgets": ()}, "budgets: expected rising KLs"),
        ({"budgets": (0.0, 1.0)}, "budgets: expected rising KLs"),
        ({"repeats": 1}, "--bootstrap.: expected at least 100"),
        ({"confidence": 1.0}, "confidence: expected a number"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        CorrelateSettings(**settings)


def test_nan_is_no_value():
    table = rows()
    table[5]["accuracy"] = table[7]["score"] = float("nan")
    entry = correlate_table(Table(table))["quality"][0]
    others = [row for place, row in enumerate(rows()) if place not in (5, 7)]
    expected = correlate_table(Table(others))["quality"][0]
    assert entry["n"] == 46 and entry["pearson"] == expected["pearson"]


def test_command(tmp_path, capsys):
    write_table(tmp_path / "points.jsonl", rows())
    assert main(["study", "correlate", str(tmp_path), "--budgets", "1", "--bootstrap", "200"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Chosen log-ratio, loss dpo" in printed and "against score" in printed
    content = json.loads((tmp_path / "correlations.json").read_text())
    assert content["settings"]["budgets"] == [1.0]
    assert main(["study", "correlate", str(tmp_path), "--score", "gold"]) == 2
    assert "got gold" in capsys.readouterr().err
