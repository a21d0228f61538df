"""A run that goes on with another number of steps."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from fastdaa.train import PreferenceConfig
from fastdaa.train.steps_left import steps_of


@pytest.fixture
def started(make_trainer):
    def run(resume=None, **options):
        trainer = make_trainer(**{"save_strategy": "steps", "save_steps": 2, **options})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


# The fixture's 8 pairs in batches of 4 make 2 steps an epoch.
@pytest.mark.parametrize(
    ("fewer", "message"),
    [
        ({"max_steps": 3}, "max_steps: expected at least the 4 steps of .*checkpoint-4, got 3"),
        (
            {"max_steps": -1, "num_train_epochs": 0.5},
            "num_train_epochs: expected at least the 4 steps of .*checkpoint-4, got 1;",
        ),
        (
            {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2},
            "num_train_epochs: expected at least the 4 steps of .*checkpoint-4, got 1;",
        ),
    ],
    ids=["steps", "part of an epoch", "epochs"],
)
def test_fewer_steps_than_are_done(started, tmp_path, fewer, message):
    started(max_steps=4)
    with pytest.raises(ValueError, match=message):
        started(True, **fewer)
    assert not (tmp_path / "out" / "checkpoint-5").exists()


@pytest.mark.parametrize(("split", "steps"), [(False, 2), (True, 3)], ids=["each", "shared"])
def test_steps_where_processes_share_a_batch(tmp_path, monkeypatch, split, steps):
    args = PreferenceConfig(
        str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, use_cpu=True,
        accelerator_config={"split_batches": split},
    )  # fmt: skip
    monkeypatch.setattr(PreferenceConfig, "world_size", 2)
    assert steps_of(args, 12) == steps


def test_a_finished_run_has_nothing_left(started, tmp_path, caplog):
    started(max_steps=4)
    metrics = Path(tmp_path / "out" / "metrics.jsonl")
    before = metrics.read_text()
    assert "train_runtime" in json.loads(before.splitlines()[-1])
    with caplog.at_level(logging.INFO, "fastdaa"):
        again = started(True, max_steps=4)
    assert "nothing left to train: " in caplog.text and "is of the last step, 4" in caplog.text
    assert again.state.global_step == 4
    assert metrics.read_text() == before


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_that_ended_within_an_epoch_takes_no_step_more(started, pairs, tmp_path, strategy):
    options = {
        "max_steps": 3, "lr_scheduler_type": "constant", "save_strategy": strategy,
        "eval_strategy": strategy, "eval_steps": 3, "eval_dataset": pairs(4), "save_steps": 3,
    }  # fmt: skip
    first = started(**options)
    weights = {name: value.clone() for name, value in first.model.state_dict().items()}
    rows = [row for row in first.state.log_history if "train_runtime" not in row]
    again = started(True, **options)
    assert again.state.global_step == 3
    assert [row for row in again.state.log_history if "train_runtime" not in row] == rows
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    folders = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert "checkpoint-3" in folders and "checkpoint-4" not in folders


def test_rows_evaluations_and_checkpoints_come_as_often_as_told_now(started, pairs, tmp_path):
    started(max_steps=2, logging_steps=2)
    more = {"logging_steps": 1, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 4}
    rows = started(True, max_steps=8, eval_dataset=pairs(4), **more).state.log_history
    assert [row["step"] for row in rows if "loss" in row] == [2, 3, 4, 5, 6, 7, 8]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8]
    folders = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert folders == {f"checkpoint-{step}" for step in (2, 3, 6, 8)}


@pytest.mark.parametrize(
    ("schedule", "steps", "jumps"),
    [("linear", 6, True), ("linear", 4, False), ("constant", 6, False)],
)
def test_a_schedule_that_jumps_is_said(started, caplog, schedule, steps, jumps):
    started(max_steps=4, save_steps=3, lr_scheduler_type=schedule)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastdaa"):
        started(True, max_steps=steps, lr_scheduler_type=schedule)
    said = f"the schedule linear ended at step 4 and ends at step {steps} now" in caplog.text
    assert said == jumps


def test_steps_are_counted_as_the_trainer_does(started, pairs, caplog):
    options = {
        "max_steps": -1, "num_train_epochs": 1.5, "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear", "data": pairs(17), "save_steps": 1,
    }  # fmt: skip
    # 5 batches of 4, so 3 steps an epoch.
    assert started(**options).state.max_steps == 5
    with caplog.at_level(logging.INFO, "fastdaa"):
        started(True, **options)
    assert "is of the last step, 5" in caplog.text


def test_the_plan_of_a_run_is_logged(started, caplog):
    with caplog.at_level(logging.INFO, "fastdaa"):
        started(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert (
        "plan: steps 3, pairs a step 4 (2 x 2 accumulated), epochs 1.5 of 8 pairs, trained "
        "parameters 6,640"
    ) in caplog.text
