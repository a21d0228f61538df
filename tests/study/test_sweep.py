"""Sweeps of the study: the plan, one run and its measures, many runs, and what is kept of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from fastdaa.study import run_one as runs_module
from fastdaa.study.columns import OPTIONAL, REQUIRED
from fastdaa.study.enumeration import response_logps
from fastdaa.study.kept_runs import POINTS, is_done
from fastdaa.study.language import Language
from fastdaa.study.plan import BETAS, Run, full_study, grid, unique
from fastdaa.study.preferences import as_dataset
from fastdaa.study.presets import PRESETS, SIZES
from fastdaa.study.run_one import (
    held_out_measures,
    length_r2_samples,
    r_squared,
    run_one,
    setting,
)
from fastdaa.study.sweep import sweep
from fastdaa.study.table import read_table

TINY = replace(
    PRESETS["H"],
    name="tiny",
    learning_rate=1e-3,
    pairs=48,
    held_out_pairs=40,
    sft_samples=256,
    sft_epochs=1,
)
LANGUAGE = Language(longest=3)


def tiny_grid(losses=("dpo",), betas=(0.1, 1.0), **options):
    return grid((TINY,), losses, betas, checkpoints=2, language=LANGUAGE, **options)


# -- the plan


def test_ids_name_what_differs():
    runs = grid(("H",), ("dpo", "rdpo"), (0.05,), (0, 3), ("d32",))
    assert [run.id for run in runs] == [
        "H-dpo-b0.05-s0-d32",
        "H-rdpo-b0.05-s0-d32-a0.1",
        "H-dpo-b0.05-s3-d32",
        "H-rdpo-b0.05-s3-d32-a0.1",
    ]


def test_the_full_study_is_the_papers_grid_and_its_extras():
    runs = full_study()
    main = [run for run in runs if run.size.name == "d32" and run.loss != "rdpo"]
    assert len(main) == 2 * 3 * len(BETAS) * 3
    assert len({run.id for run in runs}) == len(runs) == len(main) + 2 * 4 * 2 + len(BETAS) * 2
    assert {run.size.name for run in runs} == {"d12", "d32", "d64"}
    assert {run.preset.name for run in runs if run.length_alpha} == {"H"}


@pytest.mark.parametrize(
    ("checkpoints", "expected"),
    [(5, [26, 51, 77, 102, 128]), (1, [128]), (4, [32, 64, 96, 128])],
    ids=["five", "one", "four"],
)
def test_checkpoints_are_evenly_spaced_and_end_at_the_end(checkpoints, expected):
    (run,) = grid(("H",), ("dpo",), (0.1,), checkpoints=checkpoints)
    assert run.evaluated_steps == expected


def test_losses_are_those_of_the_paper():
    dpo, ipo, rdpo = (grid(("H",), (loss,), (0.25,))[0] for loss in ("dpo", "ipo", "rdpo"))
    assert "target=standard" in str(ipo.objective())
    assert "length_norm=False" in str(ipo.objective())
    assert "length_alpha=0.1" in str(rdpo.objective())
    assert "length_alpha=0.0" in str(dpo.objective())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presets": ("X",)}, "preset: expected one of H, M, got 'X'"),
        ({"sizes": ("d31",)}, "size: expected one of d12, d32, d64, got 'd31'"),
        ({"losses": ("kto",)}, "loss: expected one of .*'rdpo', got 'kto'"),
        ({"betas": (0.0,)}, "beta"),
        ({"seeds": (-1,)}, "seed: expected 0 or more, got -1"),
        ({"checkpoints": 129}, "checkpoints: expected 1 to 128"),
        ({"losses": ("rdpo",), "length_alpha": 0.0}, "length_alpha: expected a value"),
    ],
    ids=["preset", "size", "loss", "beta", "seed", "checkpoints", "alpha"],
)
def test_a_plan_that_cannot_be_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grid(**options)


def test_two_ways_to_run_one_id_are_refused():
    (run,) = grid(("H",), ("dpo",), (0.1,))
    assert unique([run, run]) == [run]
    with pytest.raises(ValueError, match=r"one way to run H-dpo-b0\.1-s0-d32"):
        unique([run, replace(run, checkpoints=4)])


def test_fingerprints_tell_settings_apart():
    (run,) = grid(("H",), ("dpo",), (0.1,))
    others = [
        replace(run, checkpoints=4),
        replace(run, preset=replace(run.preset, pairs=1024)),
        replace(run, size=SIZES["d12"]),
        replace(run, language=LANGUAGE),
    ]
    prints = {other.fingerprint() for other in others}
    assert len(prints) == len(others)
    assert run.fingerprint() not in prints
    assert run.fingerprint() == grid(("H",), ("dpo",), (0.1,))[0].fingerprint()


def test_other_references_make_other_runs(monkeypatch):
    (run,) = grid(("H",), ("dpo",), (0.1,))
    before = run.fingerprint()
    monkeypatch.setattr("fastdaa.study.sft.FORMAT", "another")
    assert run.fingerprint() != before


# -- one run


def test_r_squared_by_hand():
    x = torch.tensor([0.0, 1.0, 2.0, 9.0], dtype=torch.float64)
    y = torch.tensor([1.0, 2.0, 2.0, float("inf")], dtype=torch.float64)
    # Of the first three: covariance 1/3, variances 2/3 and 2/9.
    assert r_squared(x, y, torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(0.75)
    # The middle one twice: means 1 and 7/4, covariance 1/4, variances 1/2 and 3/16.
    assert r_squared(x, y, torch.tensor([1.0, 2.0, 1.0, 0.0])) == pytest.approx(2 / 3)
    assert r_squared(x, torch.ones_like(x), torch.ones(4)) is None


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return setting(TINY, SIZES["d32"], 0, LANGUAGE, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def moved(given):
    """The reference, a little elsewhere."""
    import copy

    model = copy.deepcopy(given.reference.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def test_length_r2_of_samples_is_that_of_many_samples(given, moved):
    logps, ref = response_logps(moved, given.world), given.reference.logps
    exact = length_r2_samples(given.world, logps, ref)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logps.exp().flatten(), 200_000, True, generator=generator)
    lengths = given.world.lengths.double().expand_as(logps).flatten()[drawn]
    ratios = (logps - ref).flatten()[drawn]
    sampled = torch.corrcoef(torch.stack([lengths, ratios]))[0, 1] ** 2
    assert exact == pytest.approx(sampled.item(), abs=0.01)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic", "rdpo"])
def test_held_out_measures_are_the_trainers(given, moved, loss, tmp_path):
    """Exact sums over an enumeration against a forward of packed pairs."""
    import copy

    from fastdaa.train import PreferenceConfig, PreferenceTrainer

    (run,) = tiny_grid((loss,), (0.3,))
    got = held_out_measures(run, given, response_logps(moved, given.world))
    name, hyperparameters = run.loss_settings
    trainer = PreferenceTrainer(
        model=copy.deepcopy(moved),
        ref_model=copy.deepcopy(given.reference.model),
        args=PreferenceConfig(
            output_dir=str(tmp_path), loss_type=[name], loss_kwargs=hyperparameters,
            per_device_eval_batch_size=64, report_to="none", disable_tqdm=True, use_cpu=True,
        ),
        eval_dataset=as_dataset(given.world, given.held_out),
    )  # fmt: skip
    expected = trainer.evaluate()
    assert got["loss_value"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    assert got["accuracy"] == pytest.approx(expected["eval_rewards/accuracies"])
    assert 0.3 * got["margin"] == pytest.approx(expected["eval_rewards/margins"], rel=1e-3)
    assert got["chosen_logratio"] == pytest.approx(expected["eval_displacement/chosen"], rel=1e-3)


def test_a_run_gives_a_valid_row_at_each_checkpoint(given, tmp_path):
    (run,) = tiny_grid(("ipo",), (0.05,))
    rows = run_one(run, tmp_path)
    assert [row["checkpoint"] for row in rows] == run.evaluated_steps == [2, 3]
    assert [row["final"] for row in rows] == [False, True]
    assert [row["fraction"] for row in rows] == [pytest.approx(2 / 3), 1.0]
    known = {*REQUIRED, *OPTIONAL} - {"kl_k1", "kl_k1_stderr", "kl_rb", "kl_rb_stderr"}
    for row in rows:
        assert set(row) == known
        assert row["score"] == row["gold"]
        assert row["margin"] == pytest.approx(row["chosen_logratio"] - row["rejected_logratio"])
        assert 0 < row["kl"] < 5 and 0 <= row["accuracy"] <= 1
    assert rows[0]["kl"] < rows[1]["kl"]
    # Training makes the held-out loss smaller than that of no change, (1 / (2 beta))^2.
    assert rows[1]["loss_value"] < 100


def test_the_same_run_gives_the_same_numbers(tmp_path):
    (run,) = tiny_grid(betas=(0.1,))
    first, second = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in run_one(run, tmp_path)]
        for _ in range(2)
    )
    assert first == second


# -- many runs


def test_a_sweep_keeps_its_runs(tmp_path):
    runs = tiny_grid()
    result = sweep(runs, tmp_path, workers=1)
    assert (result.finished, result.kept, result.failed) == (2, 0, {})
    table = read_table(tmp_path / POINTS)
    assert {row["run"] for row in table} == {"tiny-dpo-b0.1-s0-d32", "tiny-dpo-b1-s0-d32"}
    assert len(table) == 4
    again = sweep(runs, tmp_path, workers=1)
    assert (again.finished, again.kept) == (0, 2)
    assert list(read_table(tmp_path / POINTS)) == list(table)
    more = sweep(tiny_grid(betas=(0.1, 1.0, 2.0)), tmp_path, workers=1)
    assert (more.finished, more.kept) == (1, 2)
    assert len(read_table(tmp_path / POINTS)) == 6


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        NotADirectoryError, match=r"output_dir: expected a folder, .*file is a file"
    ):
        sweep(tiny_grid(), tmp_path / "file", workers=1)


def test_a_killed_run_is_done_again_and_leaves_no_second_rows(tmp_path):
    runs = tiny_grid()
    sweep(runs, tmp_path, workers=1)
    before = read_table(tmp_path / POINTS)
    # A process that dies between a run's rows and the word that it is done, or within the rows.
    folder = tmp_path / "runs" / runs[0].id
    (folder / "done.json").unlink()
    text = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(text[: len(text) // 2])
    result = sweep(runs, tmp_path, workers=1)
    assert (result.finished, result.kept) == (1, 1)

    def numbers(table):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in table]

    assert numbers(read_table(tmp_path / POINTS)) == numbers(before)


def test_other_settings_under_the_same_id_are_an_error(tmp_path):
    runs = tiny_grid(betas=(0.1,))
    sweep(runs, tmp_path, workers=1)
    changed = replace(runs[0], preset=replace(TINY, learning_rate=2e-3))
    with pytest.raises(ValueError, match=r"preset\.learning_rate 0\.001 then, 0\.002 now"):
        sweep([changed], tmp_path, workers=1)
    assert is_done(runs[0], tmp_path)


def test_a_failed_run_does_not_stop_the_others(tmp_path, monkeypatch):
    runs = tiny_grid()

    def failing(run, references):
        if run.beta == 0.1:
            raise RuntimeError("no luck\ntoday")
        return run_one(run, references)

    monkeypatch.setattr(runs_module, "run_one", failing)
    result = sweep(runs, tmp_path, workers=1)
    assert result.finished == 1
    assert result.failed == {"tiny-dpo-b0.1-s0-d32": "RuntimeError: no luck today"}
    assert {row["beta"] for row in read_table(tmp_path / POINTS)} == {1.0}


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch):
    runs = tiny_grid()

    def stopped(run, references):
        if run.beta == 1.0:
            raise KeyboardInterrupt
        return run_one(run, references)

    monkeypatch.setattr(runs_module, "run_one", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep(runs, tmp_path, workers=1)
    assert {row["beta"] for row in read_table(tmp_path / POINTS)} == {0.1}
    monkeypatch.undo()
    assert sweep(runs, tmp_path, workers=1).kept == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"runs": []}, "runs: expected at least one"), ({"workers": 0}, "workers: expected at least")],
    ids=["runs", "workers"],
)
def test_a_sweep_of_nothing_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(**{"runs": tiny_grid(), "output": tmp_path, **options})
    assert not list(tmp_path.iterdir())


def test_settings_are_json(tmp_path):
    (run,) = tiny_grid(betas=(0.1,))
    assert isinstance(run, Run)
    text = json.dumps(run.settings())
    assert '"longest": 3' in text and '"hidden": 32' in text
    assert math.isclose(json.loads(text)["beta"], 0.1)
