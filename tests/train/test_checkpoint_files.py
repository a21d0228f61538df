"""Checkpoints whose files are damaged: named before they are loaded, and passed over."""

from __future__ import annotations

import logging

import pytest
from safetensors.torch import load_file
from word_files import write_checkpoint

from fastdaa.train.checkpoint_files import defect
from fastdaa.train.checkpoints import to_continue
from fastdaa.train.run_record import new_record, write_record


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint-2", '{"global_step": 2}')


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_whole_one(checkpoint):
    assert defect(checkpoint) is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.safetensors", "has a damaged model.safetensors (Error while"),
        ("optimizer.pt", "has a damaged optimizer.pt (its end is missing)"),
        ("rng_state.pth", "has a damaged rng_state.pth (its end is missing)"),
        ("trainer_state.json", "has a damaged trainer_state.json (Unterminated"),
    ],
)
@pytest.mark.parametrize("size", ["half", "empty"])
def test_what_is_cut_off(checkpoint, name, why, size):
    if size == "half":
        cut(checkpoint / name)
    else:
        (checkpoint / name).write_bytes(b"")
        why = why.partition("(Unterminated")[0]
    assert defect(checkpoint).startswith(why)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["optimizer.pt"], "has no optimizer.pt"),
        (["scheduler.pt", "rng_state.pth"], "has no scheduler.pt, rng_state.pth"),
        (["model.safetensors"], "has no weights"),
        (
            ["optimizer.pt", "scheduler.pt", "rng_state.pth"],
            "holds the model alone, as --save_only_model saves it",
        ),
    ],
    ids=["optimizer", "schedule", "weights", "all but the model"],
)
def test_what_is_missing(checkpoint, names, why):
    for name in names:
        (checkpoint / name).unlink()
    assert defect(checkpoint) == why


def test_a_missing_part_of_the_weights(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    parts = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}}'
    (checkpoint / "model.safetensors.index.json").write_text(parts)
    assert defect(checkpoint) == "has no model-2.safetensors"


def test_files_of_other_ways_to_train(checkpoint):
    """Of FSDP, with folders and a file of random states a process; and of DeepSpeed."""
    for name in ("optimizer.pt", "model.safetensors", "rng_state.pth"):
        (checkpoint / name).unlink()
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        (checkpoint / name).mkdir()
    (checkpoint / "rng_state_0.pth").write_bytes((checkpoint / "scheduler.pt").read_bytes())
    assert defect(checkpoint) is None
    (checkpoint / "scheduler.pt").unlink()
    states = checkpoint / "global_step2" / "mp_rank_00_model_states.pt"
    states.parent.mkdir()
    assert defect(checkpoint) == "has no latest"
    (checkpoint / "latest").write_text("global_step2")
    (checkpoint / "rng_state_0.pth").rename(states)
    assert defect(checkpoint) is None
    cut(states)
    assert defect(checkpoint) == "has a damaged mp_rank_00_model_states.pt (its end is missing)"


def test_of_the_damaged_the_one_before_is_taken(tmp_path, checkpoint, caplog):
    newer = write_checkpoint(tmp_path / "checkpoint-4", '{"global_step": 4}')
    write_record(tmp_path, new_record({})._replace(steps=[2, 4]))
    assert to_continue(tmp_path) == str(newer)
    (newer / "optimizer.pt").unlink()
    with caplog.at_level(logging.WARNING):
        assert to_continue(tmp_path) == str(checkpoint)
    assert "passed over checkpoint-4, which has no optimizer.pt" in caplog.text
    cut(checkpoint / "model.safetensors")
    message = "got checkpoint-4, which has no optimizer.pt; checkpoint-2, which has a damaged model"
    with pytest.raises(ValueError, match=message):
        to_continue(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_run_goes_on_from_the_one_before(make_trainer, tmp_path, damage):
    """Without the optimizer's file, the Trainer would begin with a new one and not say so."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    make_trainer(output_dir=str(tmp_path / "whole"), **options).train()
    folder = tmp_path / "out"
    make_trainer(**{**options, "max_steps": 3}).train()
    if damage == "cut":
        cut(folder / "checkpoint-3" / "model.safetensors")
    else:
        (folder / "checkpoint-3" / "optimizer.pt").unlink()
    trainer = make_trainer(**options)
    with pytest.raises(ValueError, match=r"can be continued, .*checkpoint-3 has"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    trainer.train(resume_from_checkpoint=True)
    ends = [
        load_file(place / "checkpoint-4" / "model.safetensors")
        for place in (folder, tmp_path / "whole")
    ]
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[1])
