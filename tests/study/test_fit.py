"""Fits of tables: coefficients, errors, what is left out, what is not reported, what is said."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from law_tables import TRUTH, find, law_points, only_group, points, summary

from fastdaa.cli import main
from fastdaa.study.fit import FitSettings, fit_table
from fastdaa.study.laws import LAWS
from fastdaa.study.table import Table, write_table


@pytest.mark.parametrize("intercept", [False, True], ids=["origin", "intercept"])
@pytest.mark.parametrize("name", LAWS)
def test_synthetic_coefficients_come_back(name, intercept):
    rows = law_points(name, offset=TRUTH["intercept"] if intercept else 0.0)
    group = only_group(rows)
    fit = find(group, name, intercept)
    expected = TRUTH if intercept else TRUTH | {"intercept": 0.0}
    assert fit["coefficients"] == pytest.approx(expected, abs=1e-6)
    assert fit["rmse"] < 1e-9 and fit["loo_rmse"] < 1e-9
    assert fit["r2"] == pytest.approx(1)
    assert fit["intervals"]["alpha"] == pytest.approx([1.2, 1.2], abs=1e-6)
    assert group["fits"][group["best"]]["law"] == name
    assert fit["peak"]["d"] == pytest.approx(LAWS[name].peak(1.2, 0.8), abs=1e-6)
    assert fit["peak"]["share"] == 1.0


def test_errors_against_plain_refits():
    rows = law_points(noise=0.1, n=12)
    group = only_group(rows)
    d = np.sqrt([row["kl"] for row in rows])
    gain = np.array([row["score"] for row in rows])
    for fit in group["fits"]:
        design = LAWS[fit["law"]].design(d, fit["intercept"])
        left_out = []
        for n in range(12):
            others = np.arange(12) != n
            solution = np.linalg.lstsq(design[others], gain[others], rcond=None)[0]
            left_out.append(gain[n] - design[n] @ solution)
        solution, squares = np.linalg.lstsq(design, gain, rcond=None)[:2]
        assert fit["rmse"] == pytest.approx(math.sqrt(squares[0] / 12), rel=1e-9)
        assert fit["loo_rmse"] == pytest.approx(math.sqrt(np.mean(np.square(left_out))), rel=1e-9)
        k = design.shape[1] + 1
        aicc = 12 * math.log(squares[0] / 12) + 2 * k + 2 * k * (k + 1) / (12 - k - 1)
        assert fit["aicc"] == pytest.approx(aicc, rel=1e-9)
        assert list(fit["coefficients"].values())[: k - 1] == pytest.approx(list(solution))


def test_rmse_by_hand():
    # Two scores at each distance, 1 above and 1 below the curve: the curve is the best fit, and
    # every error is 1.
    d = [1, 1, math.e, math.e, 2, 2, 3, 3]
    exact = [2 * x * (1 - math.log(x)) for x in d]
    gain = [y + sign for y, sign in zip(exact, [1, -1] * 4, strict=True)]
    fit = find(only_group(points(d, gain)), "log")
    assert fit["coefficients"] == pytest.approx({"alpha": 2, "beta": 2, "intercept": 0})
    assert fit["rmse"] == pytest.approx(1)


def test_a_peak_beyond_the_data_is_refused():
    fit = find(only_group(law_points(high=1.2, noise=0.01)), "log")
    assert LAWS["log"].peak(1.2, 0.8) > 1.2
    assert fit["peak"] is None and fit["zero_crossing"] is None
    assert "beyond the data (up to 1.2), and would be an extrapolation" in fit["peak_reason"]
    assert "outside the data (0.1 to 1.2)" in fit["zero_crossing_reason"]


def test_a_peak_before_the_data_is_refused():
    fit = find(only_group(law_points(low=2.0, high=3.0, noise=0.001)), "log")
    assert fit["peak"] is None and "before the data (from 2)" in fit["peak_reason"]


@pytest.mark.parametrize(
    ("gain", "reason"),
    [
        (lambda d: d**3, "beta is not positive: the fitted law has no maximum"),
        (lambda d: -d - d**2, "alpha is not positive: the fitted law falls from the start"),
    ],
    ids=["rising ever faster", "falling from the start"],
)
def test_curves_without_a_peak(gain, reason):
    d = np.linspace(0.1, 2, 20)
    fit = find(only_group(points(d, gain(d))), "d")
    assert fit["peak"] is None and fit["peak_reason"] == reason


def test_zero_crossing_inside_the_data():
    fit = find(only_group(law_points(high=5.0)), "log")
    assert fit["zero_crossing"] == pytest.approx(math.exp(1.5), abs=1e-6)


def test_an_open_end_of_the_peak():
    peak = find(only_group(law_points(high=1.75, noise=0.15, n=20)), "log")["peak"]
    assert peak["d_interval"][1] is None and 0 < peak["share"] < 1
    assert peak["points_beyond"] < 3


def test_points_at_the_reference_are_dropped_and_counted():
    rows = law_points() + points([0.0, 9e-4], [50.0, 50.0])
    for n, row in enumerate(rows):
        row["run"] = f"run{n}"
    group = only_group(rows)
    assert (group["points"], group["dropped"]) == (30, 2)
    assert find(group, "log")["rmse"] < 1e-9
    assert any("2 rows at the reference" in line for line in summary(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (law_points(n=5), "expected at least 6 points away from the reference, got 5"),
        (points([1, 2, 3] * 3, range(9)), "points at 4 or more different distances, got 3"),
        (points([0] * 8, range(8)), "at least 6 points away from the reference, got 0"),
    ],
    ids=["few", "few distances", "all at the reference"],
)
def test_too_few_points_are_told(rows, message):
    group = only_group(rows)
    assert message in group["message"] and group["fits"] == [] and group["best"] is None
    assert any("no fit" in line and message in line for line in summary(rows))


OFFSETS = {
    "gold is 0 at the reference": ("gold", {}, 0.0, ""),
    "against other answers than its own": ("win_rate", {}, 0.2, "the reference's score is 0.2"),
    "given": ("win_rate", {"offset": 0.1}, 0.1, ""),
    "measured": ("reward", {}, 7.0, "the reference's score is 7"),
}


@pytest.mark.parametrize("case", OFFSETS)
def test_offsets(case):
    column, settings, offset, note = OFFSETS[case]
    rows = law_points(offset=offset)
    rows.append({"run": "start", "checkpoint": 0, "kl": 0.0, "score": offset})
    for row in rows:
        row[column] = row["score"]
        row["score"] = -99.0
    (group,) = fit_table(Table(rows), FitSettings(score=column, group=(), **settings))["groups"]
    assert group["offset"] == offset
    assert find(group, "log")["rmse"] < 1e-9
    assert find(group, "log")["peak"]["score"] == pytest.approx(
        offset + find(group, "log")["peak"]["gain"]
    )
    assert note in " ".join(group["notes"])


def test_a_score_that_is_the_gold_reward_needs_no_offset():
    rows = [row | {"gold": row["score"]} for row in law_points()]
    (group,) = fit_table(Table(rows), FitSettings(group=()))["groups"]
    assert group["offset"] == 0.0 and group["notes"] == []


@pytest.mark.parametrize("column", ["score", "win_rate"])
def test_a_judged_run_starts_where_it_was_measured(column):
    # A judge compares with the answers of the data, against which the reference wins anything.
    rows = law_points(offset=0.2)
    rows.append({"run": "start", "checkpoint": 0, "kl": 0.0, "score": 0.2})
    rows = [row | {"win_rate": row["score"]} for row in rows]
    (group,) = fit_table(Table(rows), FitSettings(score=column, group=()))["groups"]
    assert group["offset"] == pytest.approx(0.2) and find(group, "log")["rmse"] < 1e-9


def test_a_win_rate_without_the_reference_is_taken_for_one_against_it():
    rows = [row | {"win_rate": row["score"]} for row in law_points(offset=0.5)]
    (group,) = fit_table(Table(rows), FitSettings(group=()))["groups"]
    assert group["offset"] == 0.5 and "0.5, its win rate against itself" in group["notes"][0]


def test_an_estimate_below_zero_is_not_the_reference():
    rows = law_points(offset=7.0)
    rows.append({"run": "noisy", "checkpoint": 1, "kl": -0.005, "score": 99.0})
    rows.append({"run": "start", "checkpoint": 0, "kl": 0.0, "score": 7.0})
    (group,) = fit_table(Table(rows), FitSettings(group=()))["groups"]
    assert group["offset"] == 7.0 and group["dropped"] == 2


def test_an_unknown_offset_is_said():
    (group,) = fit_table(Table(law_points()), FitSettings(group=()))["groups"]
    assert "no row at KL = 0 says what the reference scores" in group["notes"][0]


def test_groups_by_any_columns():
    rows = []
    for loss in ("ipo", "dpo"):
        for colour in ("red", "blue"):
            rows += law_points(loss=loss, colour=colour, seed=1)
    content = fit_table(Table(rows), FitSettings(group=("loss", "colour"), offset=0.0))
    assert [group["group"] for group in content["groups"]] == [
        {"loss": loss, "colour": colour} for loss in ("dpo", "ipo") for colour in ("blue", "red")
    ]
    assert content["points"] == 120
    by_default = fit_table(Table(rows), FitSettings(offset=0.0))
    assert by_default["settings"]["group"] == ("loss",)


def test_only_final_checkpoints():
    rows = law_points()
    early = [row | {"checkpoint": 0, "score": 80.0} for row in rows]
    assert only_group([*early, *rows])["points"] == 60
    group = only_group([*early, *rows], final_only=True)
    assert group["points"] == 30 and find(group, "log")["rmse"] < 1e-9


def test_a_run_without_its_last_score_has_no_earlier_one_in_its_place():
    rows = law_points()
    early = [row | {"checkpoint": 0, "score": 80.0} for row in rows]
    group = only_group([*early, rows[0] | {"score": None}, *rows[1:]], final_only=True)
    assert group["points"] == 29 and find(group, "log")["rmse"] < 1e-9


def test_rows_without_the_score_are_counted():
    rows = [row | {"win_rate": row["score"] + 0.5} for row in law_points()]
    rows[3]["win_rate"] = None
    (group,) = fit_table(Table(rows), FitSettings(score="win_rate", group=()))["groups"]
    assert (group["points"], group["unknown"]) == (29, 1)


@pytest.mark.parametrize("column", ["score", "kl"])
def test_nan_is_no_measurement(column):
    """Neither among the points nor as the reference's score; files cannot hold it."""
    rows = [row | {"score": row["score"] + 3} for row in law_points()]
    start = [rows[0] | {"checkpoint": n, "kl": 0.0, "score": 3.0} for n in (50, 51)]
    broken = [row | {column: math.nan} for row in (start[1], rows[3])]
    rows = [start[0], *rows[:3], *rows[4:], broken[0] | {"checkpoint": 52}, broken[1]]
    group = only_group(rows, offset=None)
    assert (group["points"], group["dropped"], group["unknown"]) == (29, 1, 2)
    assert group["offset"] == 3 and find(group, "log")["rmse"] < 1e-9


def test_a_score_that_never_changes():
    rows = [row | {"score": 1.0} for row in law_points()]
    group = only_group(rows, offset=1.0)
    for fit in group["fits"]:
        assert fit["rmse"] == 0 and fit["peak"] is None and fit["r2"] is None
        numbers = [*fit["coefficients"].values(), *fit["intervals"]["beta"]]
        assert [math.copysign(1, number) for number in numbers] == [1.0] * 5


@pytest.mark.parametrize(
    ("seeds", "runs", "unit"),
    [(0, 30, "runs"), (1, 30, "runs"), (1, 4, "points"), (2, 30, "runs"), (4, 30, "seeds")],
)
def test_what_is_resampled(seeds, runs, unit):
    rows = law_points(noise=0.1)
    for n, row in enumerate(rows):
        row |= {"seed": n % seeds if seeds else None, "run": f"run{n % runs}", "checkpoint": n}
    group = only_group(rows)
    assert group["resampled"] == unit
    notes = " ".join(group["notes"])
    assert ("only 4 seeds to resample: intervals are rough" in notes) == (unit == "seeds")
    assert ("intervals over points are too short" in notes) == (runs == 4)


def test_differences_between_seeds_widen_the_pooled_interval():
    rows = []
    for seed in range(8):
        for row in law_points(n=25, noise=0.02, seed=seed):
            shift = 0.5 * math.sqrt(row["kl"]) * math.sin(seed)
            rows.append(row | {"seed": seed, "score": row["score"] + shift})

    def width(unit):
        low, high = find(only_group(rows, resample=unit), "log")["intervals"]["alpha"]
        return high - low

    assert width("seeds") > 1.5 * width("points")


def test_seeds_cannot_be_resampled_without_them():
    with pytest.raises(ValueError, match="resample: expected a seed in every row"):
        only_group(law_points(), resample="seeds")


def test_laws_that_noise_does_not_tell_apart_are_tied():
    noisy = only_group(law_points(noise=1.0, n=12))
    assert sum(fit["tied_with_best"] for fit in noisy["fits"]) >= 3
    clean = only_group(law_points(noise=0.001))
    assert not find(clean, "kl")["tied_with_best"] and find(clean, "log")["tied_with_best"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"laws": ("cubic",)}, "laws: expected one of"),
        ({"laws": ()}, "laws: expected at least one"),
        ({"repeats": 10}, "--bootstrap.: expected at least 100"),
        ({"confidence": 95}, "confidence: expected a number in"),
        ({"resample": "losses"}, "resample: expected one of"),
        ({"offset": math.nan}, "offset: expected a finite number"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        FitSettings(**settings)


def test_tables_that_cannot_be_fitted():
    with pytest.raises(ValueError, match="expected at least one row, got an empty table"):
        fit_table(Table([]))
    with pytest.raises(ValueError, match=r"score: expected a column with values .* got quality"):
        fit_table(Table(law_points()), FitSettings(score="quality"))
    with pytest.raises(ValueError, match="judge of run run0: expected numbers, got 'good'"):
        only_group([row | {"judge": "good"} for row in law_points()], score="judge")


def test_one_fit_is_described_as_one():
    text = " ".join(summary(law_points(noise=0.05)))
    assert "The log law's RMSE is smaller than the quadratic in KL's: ratio 0." in text
    assert "The log law d (alpha - beta log d) has the least leave-one-out error" in text
    assert "A peak inside the data is supported, at d = 1." in text
    assert "No peak supported: all rows" in " ".join(summary(law_points(high=1.0, noise=0.01)))


def test_command_writes_what_it_prints(tmp_path, capsys):
    rows = law_points(noise=0.05, loss="dpo") + law_points("d", noise=0.05, loss="ipo")
    path = tmp_path / "points.jsonl"
    write_table(path, [row | {"run": f"{n}"} for n, row in enumerate(rows)])
    assert main(["study", "fit", str(path), "--offset", "0", "--where", "loss=dpo"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the quadratic in KL" in printed and "all fits" in printed
    content = json.loads((tmp_path / "fits.json").read_text())
    assert [group["group"] for group in content["groups"]] == [{}]
    assert content["groups"][0]["points"] == 30
    output = tmp_path / "new" / "both.json"
    assert main(["study", "fit", str(tmp_path), "--offset", "0", "--output", str(output)]) == 0
    assert [group["group"]["loss"] for group in json.loads(output.read_text())["groups"]] == [
        "dpo",
        "ipo",
    ]


@pytest.mark.parametrize("scale", [{"score": 9000}, {"kl": 4e5, "score": 150}], ids=str)
def test_the_table_of_the_command_loses_nothing_in_80_columns(tmp_path, capsys, monkeypatch, scale):
    """Small scales make long numbers."""
    monkeypatch.setenv("COLUMNS", "80")
    path, points = tmp_path / "points.jsonl", law_points(noise=0.05)
    write_table(path, [row | {k: row[k] / by for k, by in scale.items()} for row in points])
    assert main(["study", "fit", str(path), "--offset", "0"]) == 0
    table = capsys.readouterr().out.split("in brackets")[0]
    assert max(map(len, table.splitlines())) <= 80
    (group,) = json.loads((tmp_path / "fits.json").read_text())["groups"]
    words = table.split()

    def short(end):
        if end is None:
            return "open"
        return f"{end:.0f}" if 99.5 <= abs(end) < 1e5 else f"{end:.2g}"

    for fit in group["fits"]:
        low, high = map(short, fit["intervals"]["beta"])
        shown = [f"{fit['coefficients']['beta']:.3g}", f"({low},", f"{high})"]
        low, high = map(short, fit["peak"]["d_interval"])
        shown += [f"{fit['peak']['d']:.3g}", f"({low},", f"{high})"]
        assert [word for word in shown if word not in words] == []


def test_command_on_somebody_elses_csv(tmp_path, capsys):
    path = tmp_path / "log.csv"
    lines = ["name,step,objective/kl,reward"]
    lines += [f"{r['run']},{r['checkpoint']},{r['kl']},{r['score'] + 3}" for r in law_points()]
    path.write_text("\n".join([*lines, "start,0,0,3"]))
    names = ["--run_column", "name", "--checkpoint_column", "step", "--kl_column", "objective/kl"]
    assert main(["study", "fit", str(path), *names, "--score", "reward"]) == 0
    content = json.loads((tmp_path / "log_fits.json").read_text())
    assert content["groups"][0]["offset"] == 3
    assert find(content["groups"][0], "log")["coefficients"]["beta"] == pytest.approx(0.8)


def test_command_on_a_second_scorer_that_has_failed_once(tmp_path, capsys):
    """Such a row of a tracked run has the reward as its score, and no win-rate."""
    rows = [row | {"win_rate": row["score"] / 9 + 0.5} for row in law_points()]
    del rows[3]["win_rate"]
    write_table(tmp_path / "track.jsonl", rows)
    assert main(["study", "fit", str(tmp_path), "--score", "win_rate"]) == 0
    (group,) = json.loads((tmp_path / "fits.json").read_text())["groups"]
    assert (group["points"], group["unknown"], group["offset"]) == (29, 1, 0.5)
    assert find(group, "log")["coefficients"]["beta"] == pytest.approx(0.8 / 9)
    assert "1 row without win_rate was left out" in " ".join(capsys.readouterr().out.split())
    assert main(["study", "fit", str(tmp_path), "--score", "judge"]) == 2


def test_tables_of_one_folder_keep_their_fits(tmp_path):
    for name, law in (("points.jsonl", "log"), ("tilt.jsonl", "d"), ("own.jsonl", "kl")):
        write_table(tmp_path / name, law_points(law))
        assert main(["study", "fit", str(tmp_path / name), "--offset", "0"]) == 0
    best = {
        path.name: (group := json.loads(path.read_text())["groups"][0])["fits"][group["best"]][
            "law"
        ]
        for path in tmp_path.glob("*.json")
    }
    assert best == {"fits.json": "log", "tilt_fits.json": "d", "own_fits.json": "kl"}


def test_command_without_enough_points(tmp_path, capsys):
    write_table(tmp_path / "points.jsonl", law_points(n=3))
    assert main(["study", "fit", str(tmp_path)]) == 1
    assert "expected at least 6 points" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where", "loss"], "expected COLUMN=VALUE, got 'loss'"),
        (["--where", "run=none"], "expected a value of run (run0, run1"),
        (["--score_column", "gold"], "expected a column gold"),
        (["--group", "colour"], "got colour"),
    ],
)
def test_command_names_what_is_wrong(tmp_path, capsys, arguments, message):
    write_table(tmp_path / "points.jsonl", law_points())
    assert main(["study", "fit", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
