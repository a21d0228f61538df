"""The demo: what it prints, and a short run of it from its runs to its page."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from fastdaa.cli import main as cli
from fastdaa.demo.run import FAST_BETAS, _show, fast_runs, main
from fastdaa.demo.table import best_lines, caution_lines, fit_lines, fits_table, results_table
from fastdaa.study.fit import FitSettings, fit_table
from fastdaa.study.laws import LAWS
from fastdaa.study.table import Table, read_table, write_table


def row(loss, beta, kl, gold, seed=0, checkpoint=5):
    return {
        "run": f"{loss}-{beta}-{seed}", "checkpoint": checkpoint, "kl": kl, "score": gold,
        "gold": gold, "win_rate": 0.5 + gold / 4, "loss": loss, "beta": beta, "seed": seed,
        "final": True,
    }  # fmt: skip


HUMP = [row("dpo", 0.1, 4.0, -0.2), row("dpo", 0.5, 1.0, 0.8), row("dpo", 2.0, 0.09, 0.3)]
RISE = [row("ipo", 0.1, 1.0, 0.7), row("ipo", 0.5, 0.36, 0.4), row("ipo", 2.0, 0.01, 0.1)]


def printed(*things):
    console = Console(width=100, record=True)
    for thing in things:
        console.print(thing)
    return console.export_text()


def test_the_table_has_a_row_for_each_loss_and_beta():
    lines = printed(results_table(Table([*RISE, *HUMP]))).splitlines()
    cells = [line.replace("│", " ").split() for line in lines if "%" in line and "gold" not in line]
    assert cells[:3] == [
        ["DPO", "0.1", "2.00", "-0.20", "45.0%"],
        ["0.5", "1.00", "+0.80", "70.0%", "best"],
        ["2", "0.30", "+0.30", "57.5%"],
    ]
    assert cells[3] == ["IPO", "0.1", "1.00", "+0.70", "67.5%", "best"]
    assert len(cells) == 6


def test_the_table_averages_seeds():
    rows = [row("dpo", 0.1, 4.0, 0.0), row("dpo", 0.1, 1.0, 1.0, seed=1)]
    text = printed(results_table(Table(rows)))
    assert "1.50" in text and "+0.50" in text and "62.5%" in text
    assert "Means of 2 seeds" in text


def test_a_fall_is_told_only_where_there_is_one():
    lines = list(best_lines(Table([*HUMP, *RISE])))
    assert lines[0] == (
        "DPO: most gold at beta 0.5, +0.80 at sqrt(KL) 1.00; beyond it gold falls, to -0.20 at "
        "2.00 (beta 0.1)"
    )
    assert lines[1].startswith("IPO: most gold at beta 0.1, +0.70 at sqrt(KL) 1.00; no fall")


def test_what_training_sees_of_the_fall_and_what_one_seed_cannot_say():
    rows = [row | {"margin": margin} for row, margin in zip(HUMP, (8.8, 2.1, 0.3), strict=True)]
    margins, seeds = caution_lines(Table([*rows, *RISE]))
    assert margins.endswith("still grows on held-out pairs, from 2.1 to 8.8 (DPO), in nats.")
    assert seeds.startswith("One seed is one world")
    # Nothing is said about a margin that shrinks or is unknown, nor of one seed where there are
    # more.
    shrinks = [row | {"margin": -row["margin"]} for row in rows]
    for other in (shrinks, HUMP, RISE):
        assert list(caution_lines(Table(other))) == [seeds]
    assert list(caution_lines(Table([*RISE, row("ipo", 0.1, 1.0, 0.7, seed=1)]))) == []


def law_rows(bump=0.0):
    """Rows on the law d (0.9 - 0.6 log d); the third may lie higher."""
    kls = [0.04, 0.16, 0.36, 0.81, 1.44, 2.25, 3.24, 4.0, 5.0]
    gains = [float(LAWS["log"].value(kl**0.5, 0.9, 0.6)) for kl in kls]
    gains[2] += bump
    return [
        row("dpo", 0.1, kl, gain, checkpoint=place) | {"final": place == len(kls) - 1}
        for place, (kl, gain) in enumerate(zip(kls, gains, strict=True))
    ]


def fits_of(rows, **settings):
    return fit_table(Table(rows), FitSettings(group=("loss",), repeats=100, **settings))


def test_the_fitted_law_is_shown_with_its_peak_and_what_it_is_fitted_to():
    rows = law_rows()
    fits, ends = fits_of(rows), fits_of(rows, final_only=True)
    text = printed(fits_table(fits, ends))
    # Its maximum is at e^(0.9 / 0.6 - 1) = 1.65, and 0.6 * 1.65 = 0.99 high; the best row is at
    # sqrt(3.24) = 1.80.
    cells = next(line for line in text.splitlines() if "all 9 checkpoints" in line)
    shown = [cell.strip() for cell in cells.strip("│").split("│")]
    assert [shown[0], *shown[2:]] == [
        "DPO",
        "0.90",
        "0.60",
        "0.000",
        "+0.99 at 1.65",
        "+0.99 at 1.80",
    ]
    assert "the 1 end " in text
    lines = list(fit_lines(fits, ends))
    assert not any("contradicts" in line for line in lines)
    assert lines == [
        "DPO, the ends: no fit, expected at least 6 points away from the reference, got 1"
    ]


def test_a_peak_that_contradicts_the_best_measured_is_said_to():
    fits = fits_of(law_rows(bump=0.5))
    lines = list(fit_lines(fits, fits))
    assert len(lines) == 1
    assert "DPO (fitted to all checkpoints); DPO (fitted to the ends)" in lines[0]
    assert any("contradicts the best checkpoint in 1 of 1 group" in s for s in fits["summary"])


def test_too_few_points_give_no_fit_but_a_reason():
    fits = fits_of(HUMP)
    assert "no fit" in printed(fits_table(fits, fits))
    assert all(line.startswith("DPO, ") and ": no fit, " in line for line in fit_lines(fits, fits))


def test_fast_runs_are_small():
    runs = fast_runs(("dpo", "ipo"), (0,))
    assert len(runs) == 2 * len(FAST_BETAS)
    assert {run.preset.steps for run in runs} == {8}
    assert {run.language.responses for run in runs} == {1555}


@pytest.mark.slow
def test_a_glimpse_of_the_whole_demo(tmp_path, capsys):
    console = Console(width=100, record=True)
    record = main(tmp_path, losses=("slic",), fast=True, console=console)
    assert record["failed"] == {}
    assert len(read_table(tmp_path / "points.jsonl")) == 9
    for name in ("index.html", "fits.json", "correlations.json", "study.json"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert json.loads((tmp_path / "study.json").read_text())["steps"]["sweep"]["result"] == "3 runs"
    text = console.export_text()
    assert "these numbers mean nothing" in text
    assert "SLiC: most gold at beta" in text and "R(d) = d (" in text and "the 3 ends" in text
    assert "index.html" in text.splitlines()[-2]
    page = (tmp_path / "index.html").read_text()
    assert "these numbers mean nothing" in page.split("<h1>")[0]
    assert "Claims" not in page and "reproduced" not in page.split("</style>")[1]


def test_a_glimpse_and_real_runs_do_not_share_a_folder(tmp_path, capsys):
    write_table(tmp_path / "points.jsonl", [row | {"preset": "H"} for row in HUMP])
    assert cli(["demo", "--fast", "--output_dir", str(tmp_path)]) == 2
    assert "expected a folder of runs in preset fast alone" in capsys.readouterr().err


def test_only_the_runs_that_were_asked_for_are_shown(tmp_path):
    others = [row("dpo", 0.5, 1.0, -9.0) | {"run": "another", "size": "d12"}]
    write_table(tmp_path / "points.jsonl", [*HUMP, *others])
    console = Console(width=100, record=True)
    _show(tmp_path, {row["run"] for row in HUMP}, False, console)
    text = console.export_text()
    assert "DPO: most gold at beta 0.5, +0.80" in text and "no fit" in text
    _show(tmp_path, {"none"}, False, console)
    assert "No run was finished." in console.export_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--losses", "ppo"], "loss: expected one of"),
        (["--seeds", "-3"], "seed: expected 0 or more, got -3"),
        (["--workers", "0"], "workers: expected at least 1, got 0"),
    ],
    ids=["loss", "seed", "workers"],
)
def test_mistakes_are_one_line(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(["demo", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdaa demo: error: ") and error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())
