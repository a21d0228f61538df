"""Runs that end in the middle, and continue to the same bits."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from fastdaa.train import checkpoints
from fastdaa.train.callbacks import read_metrics
from fastdaa.train.checkpoints import is_complete, last_complete, remove_incomplete
from fastdaa.train.run_record import read_record, write_record

STEPS = 6
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(run, whole_folder):
    """``whole(name, **options)``: weights and losses of a run that nothing stops."""

    def build(name="plain", **options):
        folder = whole_folder / name
        if not (folder / "final.safetensors").exists():
            assert run(folder, **{**options, "save_steps": 100}) == 0
        return load_file(folder / "final.safetensors"), losses(folder)

    return build


def losses(folder):
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    return [(row["step"], row["loss"], row["num_tokens"]) for row in rows]


def assert_equal(folder, expected):
    weights, rows = expected
    got = load_file(folder / "final.safetensors")
    assert got.keys() == weights.keys()
    assert all(torch.equal(got[name], weights[name]) for name in got)
    assert losses(folder) == rows
    assert [step for step, *_ in rows] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("step", range(1, STEPS))
def test_killed_after_any_step(run, whole, tmp_path, step):
    assert run(tmp_path, end={"step": step, "number": signal.SIGKILL}) == KILLED
    assert (last_complete(tmp_path) is None) == (step <= 2)
    assert run(tmp_path, resume=True) == 0
    assert_equal(tmp_path, whole())


@pytest.mark.parametrize("place", ["before", "model", "optimizer", "state", "rotation"])
def test_killed_while_a_checkpoint_is_written(run, whole, tmp_path, place):
    options = {"save_total_limit": 1}
    assert run(tmp_path, end={"step": 4, "place": place}, **options) == KILLED
    kept = last_complete(tmp_path)
    if place == "rotation":
        # The first one had nothing to delete.
        end = {"step": 4, "place": place}
        assert run(tmp_path, end=end, resume=True, **options) == KILLED
        kept = last_complete(tmp_path)
        assert kept == str(tmp_path / "checkpoint-4")
    assert kept is not None
    written = tmp_path / "checkpoint-4"
    assert written.exists() == (place != "before")
    assert run(tmp_path, resume=True, **options) == 0
    assert_equal(tmp_path, whole())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


OPTIONS = {
    "dropout": {"model": {"attention_dropout": 0.3}, "disable_dropout": False},
    "packs and accumulation": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "tokens_per_pack": 20,
    },
    "new adapter": {"lora": {"r": 2, "lora_dropout": 0.2}, "disable_dropout": False},
    "cached reference": {"precompute_ref_log_probs": True},
    "bf16": {"bf16": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_carry_state(run, whole, tmp_path, name):
    options = {**OPTIONS[name], "ref_cache_dir": str(tmp_path / "cache")}
    folder = tmp_path / "out"
    assert run(folder, end={"step": 5, "number": signal.SIGKILL}, **options) == KILLED
    assert run(folder, resume=True, **options) == 0
    expected = whole(name, **options)
    assert_equal(folder, expected)
    if name == "dropout":
        assert expected[1][0][1] != whole()[1][0][1]


def test_an_adapter_that_was_trained_before(run, whole, tmp_path):
    pytest.importorskip("peft")
    assert run(tmp_path / "first", lora={"r": 2}, max_steps=3) == 0
    adapter = {"adapter": str(tmp_path / "first" / "checkpoint-3")}
    folder = tmp_path / "out"
    assert run(folder, end={"step": 3, "number": signal.SIGKILL}, **adapter) == KILLED
    assert run(folder, resume=True, **adapter) == 0
    assert_equal(folder, whole("trained adapter", **adapter))
    assert sorted(p.name for p in (folder / "checkpoint-6").iterdir() if p.is_dir()) == []
    # Compared with the adapter as it was, not with the base model and not with the checkpoint.
    assert losses(folder)[0][1] == pytest.approx(0.6931472)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_saves_a_checkpoint(run, whole, tmp_path, number):
    assert run(tmp_path, end={"step": 3, "number": number}) == 130
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-3")
    assert run(tmp_path, resume=True) == 0
    assert_equal(tmp_path, whole())


def test_a_checkpoint_in_time_does_not_end_a_run_as_if_it_were_done(run, tmp_path):
    """The Trainer's own, which would take SIGTERM away from ours."""
    end = {"step": 3, "number": signal.SIGTERM}
    assert run(tmp_path, end=end, enable_jit_checkpoint=True) == 130
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-3")


def test_tokens_are_counted_between_logged_rows_too(run, whole, tmp_path):
    options = {"logging_steps": 3, "save_steps": 2}
    assert run(tmp_path, end={"step": 5, "number": signal.SIGKILL}, **options) == KILLED
    assert run(tmp_path, resume=True, **options) == 0
    expected = {step: tokens for step, _, tokens in whole()[1]}
    assert [(step, tokens) for step, _, tokens in losses(tmp_path)] == [
        (3, expected[3]),
        (6, expected[6]),
    ]


def test_a_half_checkpoint_pushes_out_no_whole_one(run, tmp_path):
    """Not even where modification times say nothing, and the larger number counts as newer."""
    assert run(tmp_path, max_steps=2, save_total_limit=1) == 0
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    record = read_record(tmp_path)
    write_record(tmp_path, record._replace(steps=[*record.steps, 9]))
    assert run(tmp_path, resume=True, max_steps=3, save_steps=3, save_total_limit=1) == 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert is_complete(tmp_path / "checkpoint-3")


def test_only_half_checkpoints_are_removed(tmp_path):
    for name in ("checkpoint-1", "checkpoint-notes", "other"):
        (tmp_path / name).mkdir()
    remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-notes", "other"]


def test_half_checkpoints_stay_where_nobody_asked_for_a_limit(run, tmp_path):
    (tmp_path / "checkpoint-9").mkdir(parents=True)
    assert run(tmp_path, max_steps=2) == 0
    assert (tmp_path / "checkpoint-9").is_dir()


def test_continuing_needs_a_whole_checkpoint(make_trainer, tmp_path, caplog):
    half = tmp_path / "out" / "checkpoint-1"
    half.mkdir(parents=True)
    for text in (None, "", '{"global_step"', "[]"):
        if text is not None:
            (half / "trainer_state.json").write_text(text)
        with pytest.raises(ValueError, match="expected a complete checkpoint"):
            make_trainer().train(resume_from_checkpoint=str(half))
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    messages = [record.message for record in caplog.records if "checkpoint" in record.message]
    assert messages == ["no complete checkpoint yet: training from the beginning"]


def test_a_checkpoint_that_is_written_again_is_incomplete_meanwhile(
    make_trainer, tmp_path, monkeypatch
):
    make_trainer(save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "out" / "checkpoint-1"
    assert is_complete(folder)
    trainer, seen = make_trainer(save_strategy="steps", save_steps=1), []
    save_model = trainer.save_model

    def watching(*args, **kwargs):
        seen.append(is_complete(folder))
        return save_model(*args, **kwargs)

    monkeypatch.setattr(trainer, "save_model", watching)
    trainer.train()
    assert seen == [False] and is_complete(folder)


def test_the_last_checkpoint_is_that_of_the_highest_step(tmp_path):
    assert last_complete(tmp_path / "none") is None
    for step in (9, 10, 200):
        checkpoints.folder(tmp_path, step).mkdir()
    for step in (9, 10):
        (checkpoints.folder(tmp_path, step) / "trainer_state.json").write_text(
            json.dumps({"global_step": step})
        )
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-10")


def test_killed_in_its_first_checkpoint_a_run_with_a_limit_starts_again(run, whole, tmp_path):
    options = {"save_total_limit": 1}
    assert run(tmp_path, end={"step": 2, "place": "optimizer"}, **options) == KILLED
    assert last_complete(tmp_path) is None and (tmp_path / "checkpoint-2").is_dir()
    assert (
        run(tmp_path, resume=True, end={"step": 1, "number": signal.SIGKILL}, **options) == KILLED
    )
    assert run(tmp_path, resume=True, **options) == 0
    assert_equal(tmp_path, whole())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


PLATEAU = {
    "eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.5}, "load_best_model_at_end": True,
    "disable_dropout": False, "model": {"attention_dropout": 0.2},
}  # fmt: skip


@pytest.fixture(scope="module")
def plateau(pairs):
    return {**PLATEAU, "eval": pairs(6, seed=1).to_list()}


def evaluated(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]


@pytest.mark.parametrize("killed", [False, True], ids=["Ctrl-C", "Ctrl-C, and killed behind it"])
def test_an_evaluation_before_which_a_run_was_stopped_is_made_up(
    run, plateau, tmp_path, whole_folder, killed
):
    """Or its row would be missing, the learning rate another one, and maybe the best model."""
    expected = whole_folder / "plateau"
    if not expected.exists():
        assert run(expected, **plateau) == 0
    assert run(tmp_path, end={"step": 4, "number": signal.SIGINT}, **plateau) == 130
    if killed:
        # It is made up, and the process dies before it has a checkpoint that knows.
        end = {"step": 5, "number": signal.SIGKILL}
        assert run(tmp_path, resume=True, end=end, **plateau) == KILLED
    assert run(tmp_path, resume=True, **plateau) == 0
    assert_equal(tmp_path, (load_file(expected / "final.safetensors"), losses(expected)))
    assert [step for step, _ in evaluated(tmp_path)] == [2, 4, 6]
    assert evaluated(tmp_path) == evaluated(expected)
    assert read_record(tmp_path).best == read_record(expected).best


def test_an_evaluation_of_an_epoch_is_made_up(run, pairs, tmp_path, whole_folder):
    options = {"eval_strategy": "epoch", "save_steps": 3, "eval": pairs(6, seed=1).to_list()}
    expected = whole_folder / "epoch"
    assert run(expected, **options) == 0
    assert run(tmp_path, end={"step": 3, "number": signal.SIGINT}, **options) == 130
    assert run(tmp_path, resume=True, **options) == 0
    assert [step for step, _ in evaluated(tmp_path)] == [3, 6]
    assert evaluated(tmp_path) == evaluated(expected)


def test_an_evaluation_behind_the_last_checkpoint_is_made_up_once(run, pairs, tmp_path):
    """A process that is killed in it has no step left to train."""
    options = {"eval_strategy": "epoch", "save_steps": 3, "eval": pairs(6, seed=1).to_list()}
    assert run(tmp_path, **options) == 0
    expected = evaluated(tmp_path)
    assert [step for step, _ in expected] == [3, 6]
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if '"step": 6, "eval_loss"' not in row]
    (tmp_path / "metrics.jsonl").write_text("".join(kept))
    assert run(tmp_path, resume=True, **options) == 0
    assert evaluated(tmp_path) == expected
    assert run(tmp_path, resume=True, **options) == 0
    assert evaluated(tmp_path) == expected
