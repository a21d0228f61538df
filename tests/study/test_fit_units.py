"""Fits when points belong together: what is drawn and left out as a whole, and predicted; CSV."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from law_tables import find, law_points, only_group, points, summary

from fastdaa.cli import main
from fastdaa.study.laws import LAWS
from fastdaa.study.table import write_table


def run_points(runs=8, checkpoints=12, spread=0.4, low=0.3):
    """Runs that each have an error of their own in all checkpoints."""
    rows = []
    for run in range(runs):
        shift = spread * math.sin(2.3 * run)
        for row in law_points(low=low + 0.1 * run, n=checkpoints, noise=0.01, seed=run):
            at = row["score"] + shift * math.sqrt(row["kl"])
            rows.append(row | {"run": f"run{run}", "checkpoint": len(rows), "score": at, "seed": 0})
    return rows


def test_checkpoints_of_a_run_do_not_narrow_the_intervals_of_one_seed():
    def width(**settings):
        low, high = find(only_group(run_points(), **settings), "log")["intervals"]["alpha"]
        return high - low

    assert width() == width(resample="runs") > 1.5 * width(resample="points")


def test_what_is_left_out_is_a_whole_run():
    rows = run_points()
    group = only_group(rows)
    d = np.sqrt([row["kl"] for row in rows])
    gain, runs = np.array([row["score"] for row in rows]), np.array([row["run"] for row in rows])
    for fit in group["fits"]:
        design = LAWS[fit["law"]].design(d, fit["intercept"])
        errors = np.empty_like(gain)
        for run in set(runs):
            out = runs == run
            solution = np.linalg.lstsq(design[~out], gain[~out], rcond=None)[0]
            errors[out] = gain[out] - design[out] @ solution
        assert fit["loo_rmse"] == pytest.approx(math.sqrt(np.mean(errors**2)), rel=1e-9)
    by_points = only_group(rows, resample="points")
    assert find(group, "log")["loo_rmse"] > find(by_points, "log")["loo_rmse"]


def test_a_run_that_alone_determines_a_coefficient_leaves_a_finite_error():
    rows = [
        row | {"run": "near", "checkpoint": n} for n, row in enumerate(points([1.0] * 6, [1] * 6))
    ]
    rows += [
        row | {"run": "far", "checkpoint": n} for n, row in enumerate(points([2, 3, 4], [1] * 3))
    ]
    assert 0 < find(only_group(rows, resample="runs"), "d")["loo_rmse"] < 10


@pytest.mark.parametrize("unit", ["seeds", "runs"])
def test_a_single_unit_is_not_resampled(unit):
    rows = [row | {"run": "one", "checkpoint": n, "seed": 0} for n, row in enumerate(law_points())]
    with pytest.raises(ValueError, match=f"expected two or more {unit} in a group, got 1"):
        only_group(rows, resample=unit)


def test_the_farthest_third_is_predicted_by_the_rest():
    rows = law_points(n=12, noise=0.1)
    d = np.sqrt([row["kl"] for row in rows])
    gain = np.array([row["score"] for row in rows])
    group = only_group(rows)
    for fit in group["fits"]:
        design = LAWS[fit["law"]].design(d, fit["intercept"])
        solution = np.linalg.lstsq(design[:8], gain[:8], rcond=None)[0]
        errors = gain[8:] - design[8:] @ solution
        assert fit["far_rmse"] == pytest.approx(math.sqrt(np.mean(errors**2)), rel=1e-9)
    told = f"{find(group, 'log')['far_rmse']:.3g}"
    assert f"miss the farthest third by (RMSE): the log law d (alpha - beta log d) {told}" in (
        " ".join(summary(rows))
    )


def test_nothing_is_predicted_from_too_few_distances():
    fit = find(only_group(points([1] * 4 + [2, 3, 4], range(7))), "log")
    assert fit["far_rmse"] is None


def test_fits_as_a_tidy_csv(tmp_path):
    rows = law_points(noise=0.05, loss="dpo") + law_points("d", noise=0.05, loss="ipo")
    write_table(tmp_path / "points.jsonl", [row | {"run": f"{n}"} for n, row in enumerate(rows)])
    output = tmp_path / "new" / "fits.csv"
    assert main(["study", "fit", str(tmp_path), "--offset", "0", "--csv", str(output)]) == 0
    groups = json.loads((tmp_path / "fits.json").read_text())["groups"]
    with output.open(newline="") as lines:
        found = list(csv.DictReader(lines))
    assert [(r["loss"], r["law"], r["intercept"]) for r in found] == [
        (g["group"]["loss"], f["law"], str(f["intercept"])) for g in groups for f in g["fits"]
    ]
    fits = [fit for group in groups for fit in group["fits"]]
    for row, fit in zip(found, fits, strict=True):
        assert float(row["alpha"]) == fit["coefficients"]["alpha"]
        assert [float(row["beta_low"]), float(row["beta_high"])] == fit["intervals"]["beta"]
        assert row["peak_d"] == ("" if fit["peak"] is None else str(fit["peak"]["d"]))
    assert sum(row["best"] == "True" for row in found) == 2
