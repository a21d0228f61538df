"""Several runs in one output folder: whose checkpoint is continued, and whose may be deleted."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from fastdaa.data import PairRows
from fastdaa.train import checkpoints
from fastdaa.train.run_record import (
    RUN_FILE,
    check_same_run,
    new_record,
    read_record,
    rows_fact,
    write_record,
)
from fastdaa.train.stage_config import RewardConfig, SftConfig


@pytest.fixture
def started(make_trainer):
    """``started(resume=None, **options)``: a run with a checkpoint a step, at its end."""

    def run(resume=None, **options):
        trainer = make_trainer(**{"save_strategy": "steps", "save_steps": 1, **options})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def steps_of(trainer):
    """The steps whose rows the run has logged itself or taken over."""
    return [row["step"] for row in trainer.state.log_history if "loss" in row]


def test_an_older_longer_run_does_not_win(started, tmp_path, caplog):
    out = tmp_path / "out"
    started(max_steps=4)
    shorter = started(max_steps=2, beta=0.5)
    assert names(out) == [f"checkpoint-{step}" for step in range(1, 5)]
    assert checkpoints.last_complete(out) == str(out / "checkpoint-2")
    with caplog.at_level(logging.WARNING):
        resumed = started(True, max_steps=3, beta=0.5)
    assert "passed over checkpoint-3, checkpoint-4 of another run" in caplog.text
    assert steps_of(resumed) == [1, 2, 3]
    losses = [row["loss"] for row in resumed.state.log_history if "loss" in row]
    assert losses[:2] == [row["loss"] for row in shorter.state.log_history if "loss" in row]


def test_a_run_without_a_checkpoint_does_not_continue_another(started, tmp_path):
    out = tmp_path / "out"
    started(max_steps=2)
    started(max_steps=1, save_strategy="no")
    message = (
        rf"expected a checkpoint of the run that was started last in {out} \(20.*\), which has "
        "none, got checkpoint-1, checkpoint-2 of another run; give the path"
    )
    with pytest.raises(ValueError, match=message):
        started(True, max_steps=3)
    # Named, it is continued, and is the run of the folder from then on.
    resumed = started(str(out / "checkpoint-2"), max_steps=3)
    assert steps_of(resumed) == [1, 2, 3]
    assert read_record(out).steps == [1, 2, 3]
    assert steps_of(started(True, max_steps=4, save_total_limit=1)) == [1, 2, 3, 4]
    assert names(out) == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.02}, r"learning_rate 0\.01 then, 0\.02 now"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type 'constant' then, 'cosine' now"),
        ({"seed": 7}, "seed 42 then, 7 now"),
        ({"weight_decay": 0.5}, r"weight_decay 0\.0 then, 0\.5 now"),
        ({"adam_beta1": 0.5}, r"adam_beta1 0\.9 then, 0\.5 now"),
        ({"adam_beta2": 0.5}, r"adam_beta2 0\.999 then, 0\.5 now"),
        ({"adam_epsilon": 0.5}, "adam_epsilon 1e-08 then, 0.5 now"),
        ({"optim": "sgd"}, "optim 'adamw_torch_fused' then, 'sgd' now"),
        ({"optim_args": "foreach=False"}, "optim_args None then, 'foreach=False' now"),
        ({"warmup_steps": 3}, "warmup_steps 0 then, 3 now"),
        ({"beta": 0.3}, r"objective 'dpo\(beta=0\.1.* then, 'dpo\(beta=0\.3"),
        ({"loss_type": "ipo"}, r"objective 'dpo\(.* then, 'ipo\("),
    ],
    ids=[
        "rate", "schedule", "seed", "weight decay", "beta 1", "beta 2", "epsilon", "optimizer",
        "its options", "warm-up", "hyperparameter", "loss",
    ],
)  # fmt: skip
@pytest.mark.parametrize("named", [False, True], ids=["last", "named"])
def test_other_settings_are_another_run(started, tmp_path, changed, message, named):
    started(max_steps=1)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    with pytest.raises(ValueError, match=f"expected the run of {checkpoint}.*{message}"):
        started(str(checkpoint) if named else True, max_steps=2, **changed)


def test_other_data_is_another_run(started, pairs):
    started(max_steps=1)
    with pytest.raises(ValueError, match=r"data '8 rows \w+' then, '9 rows \w+' now"):
        started(True, data=pairs(9), max_steps=2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"lora_alpha": 64}, "rank 2, alpha 8.* then, 'LoRA, rank 2, alpha 64"),
        ({"r": 4}, "rank 2, alpha 8.* then, 'LoRA, rank 4, alpha 8"),
        ({"use_rslora": True}, ".*dropout 0, on .* then, 'LoRA.*, dropout 0, rank-stabilised, on"),
        ({"use_dora": True}, ".*dropout 0, on .* then, 'LoRA.*, dropout 0, DoRA, on"),
    ],
    ids=["alpha", "rank", "rank-stabilised", "DoRA"],
)
def test_another_adapter_is_another_run(started, other, message):
    """Its weights fit where its factor is another."""
    lora = pytest.importorskip("peft").LoraConfig
    options = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}
    started(max_steps=1, peft_config=lora(**options))
    with pytest.raises(ValueError, match=f"adapter 'LoRA, {message}"):
        started(True, max_steps=2, peft_config=lora(**{**options, **other}))


def test_records_of_before_the_adapter_was_a_fact_are_continued(tmp_path):
    write_record(tmp_path, new_record({"loss": "dpo"}))
    check_same_run(tmp_path, {"loss": "dpo", "adapter": "LoRA, rank 2"})
    with pytest.raises(ValueError, match="quantization None then, '4 bits' now"):
        check_same_run(tmp_path, {"loss": "dpo", "quantization": "4 bits"})
    write_record(tmp_path, new_record({"loss": "dpo", "adapter": None}))
    with pytest.raises(ValueError, match="adapter None then, 'LoRA, rank 2' now"):
        check_same_run(tmp_path, {"loss": "dpo", "adapter": "LoRA, rank 2"})


def changed(model, last=False):
    """With another value in one weight, the first or the last."""
    weight = [*model.parameters()][-1 if last else 0]
    with torch.no_grad():
        weight.view(-1)[-1 if last else 0] += 1e-3
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda model: {"model": changed(model)},
        lambda model: {"model": changed(model, last=True)},
        lambda model: {"ref_model": changed(model)},
    ],
    ids=["policy", "its last weight", "given"],
)
def test_another_reference_is_another_run(started, tiny_model, other):
    """The policy comes out of the checkpoint, what it is compared with does not."""
    started(max_steps=1)
    with pytest.raises(ValueError, match=r"reference 'float32 \w+' then, 'float32 \w+' now"):
        started(True, max_steps=2, **other(tiny_model()))


def test_the_same_reference_given_by_name_is_the_same_run(started, tiny_model):
    started(max_steps=1)
    assert started(True, max_steps=2, ref_model=tiny_model()).state.global_step == 2


def test_where_nothing_is_compared_with_the_model_may_be_another(started, tiny_model):
    started(max_steps=1, loss_type="simpo")
    resumed = started(True, max_steps=2, loss_type="simpo", model=changed(tiny_model()))
    assert resumed.state.global_step == 2


def test_another_model_under_the_adapter_is_another_run(started, tiny_model):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    started(max_steps=1, peft_config=lora)
    # Another adapter at the start is no other run: its weights come out of the checkpoint.
    torch.manual_seed(9)
    policy = peft.get_peft_model(tiny_model(), lora)
    assert started(True, max_steps=2, model=policy).state.global_step == 2
    with pytest.raises(ValueError, match=r"base model 'float32 \w+' then, 'float32 \w+' now"):
        started(True, max_steps=3, model=changed(tiny_model()), peft_config=lora)


def test_a_trainer_continues_its_own_run(started):
    trainer = started(max_steps=1)
    trainer.args.max_steps = 2
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_what_changes_no_run(started, pairs):
    started(max_steps=1)
    changed = {"logging_steps": 2, "per_device_train_batch_size": 2, "tokens_per_pack": 12}
    assert started(True, max_steps=2, layout="packed", **changed).state.global_step == 2


def test_others_checkpoints_are_not_rotated_away(started, tmp_path):
    out = tmp_path / "out"
    started(max_steps=2)
    (out / "checkpoint-notes").mkdir()
    (out / "checkpoint-notes" / "notes.txt").touch()
    (out / "checkpoint-empty").mkdir()
    before = names(out)
    with pytest.raises(
        ValueError,
        match=f"save_total_limit: expected no checkpoints of other runs in {out}, got "
        "checkpoint-1, checkpoint-2, checkpoint-notes, which would be deleted",
    ):
        started(max_steps=1, save_total_limit=1)
    assert names(out) == before
    assert read_record(out).steps == [1, 2]  # still the run that is there
    with pytest.raises(ValueError, match="got checkpoint-notes, which would"):
        started(True, max_steps=3, save_total_limit=1)
    assert started(True, max_steps=3).state.global_step == 3


def test_only_what_is_half_and_our_own_is_removed(tmp_path):
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    (tmp_path / "checkpoint-4" / "model.safetensors").rename(tmp_path / "checkpoint-4" / RUN_FILE)
    checkpoints.remove_incomplete(tmp_path, own=[1, 2])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_checkpoints_without_a_record_are_continued(started, tmp_path):
    out = tmp_path / "out"
    started(max_steps=2)
    for path in out.rglob(RUN_FILE):
        path.unlink()
    assert checkpoints.last_complete(out) == str(out / "checkpoint-2")
    assert steps_of(started(True, max_steps=3, save_total_limit=2)) == [1, 2, 3]
    assert names(out) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("text", ["", "[]", '{"started": 1}', '{"started"'])
def test_a_record_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / RUN_FILE).write_text(text)
    assert read_record(tmp_path) is None


def test_facts_of_rows(pairs):
    data = pairs(12)
    fact = rows_fact(PairRows(data))
    assert fact.startswith("12 rows ") and fact == rows_fact(PairRows(pairs(12)))
    rows = data.to_list()
    rows[7] = {**rows[7], "chosen_ids": [*rows[7]["chosen_ids"], 5]}
    assert rows_fact(PairRows(type(data).from_list(rows))) != fact
    # A boundary between two columns is part of it.
    moved = [{"prompt_ids": a, "chosen_ids": b, "rejected_ids": [4]} for a, b in (([1, 2], [3]),)]
    other = [{"prompt_ids": a, "chosen_ids": b, "rejected_ids": [4]} for a, b in (([1], [2, 3]),)]
    assert rows_fact(PairRows(type(data).from_list(moved))) != rows_fact(
        PairRows(type(data).from_list(other))
    )
    assert rows_fact(None) is None


def test_settings_of_every_kind_of_run_fit_into_json(make_trainer, tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True}
    centred = RewardConfig(center_rewards_coefficient=0.01, **options)
    for config in (make_trainer().args, SftConfig(**options), centred):
        assert json.loads(json.dumps(config.identity())) == config.identity()
    assert centred.identity()["center_rewards_coefficient"] == 0.01
