"""No training step waits for the device: it runs on tensors that have no values.

On the meta device, whatever asks for a value raises (``item``, a condition, ``nonzero``, a copy to
the CPU), and so does an operation on tensors of two devices. On a GPU the first waits until the
device has done all its work, and the second is an error.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from device_memory import counted

from fastdaa.losses import LOSSES
from fastdaa.train import UnpairedConfig, UnpairedTrainer
from fastdaa.train.reward import RewardTrainer
from fastdaa.train.reward_models import load_reward_model
from fastdaa.train.sft import SftTrainer
from fastdaa.train.stage_config import RewardConfig, SftConfig


def step_on_meta(trainer, dtype=torch.bfloat16):
    """Forward and backward of a batch, models and batch on the meta device, by the code of a GPU.

    It is the last batch before a row is logged, whose exact KL is measured. Returns how often the
    host asked for the number of rows that count.
    """
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.state.max_steps = 1
    models = (trainer.model, getattr(getattr(trainer, "reference", None), "model", None))
    with pytest.MonkeyPatch.context() as patch, counted() as held:
        patch.setattr(type(trainer.args), "device", torch.device("meta"))
        for model in filter(None, models):
            model.to("meta", dtype)
        trainer.model.train()
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
    for name, weight in trainer.model.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name
    return held.questions


@pytest.mark.parametrize("loss", LOSSES)
def test_preferences(loss, make_trainer):
    # Where tokens leave the products, the host has to know how many are left.
    assert step_on_meta(make_trainer(loss_type=loss)) == LOSSES[loss].sparse


@pytest.mark.parametrize("layout", ["prefix_shared", "packed"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mistral", "GPTNeoX", "GPT2"])
def test_layouts(family, layout, make_trainer, tiny_model):
    # In padded rows transformers asks whether the mask hides anything.
    # Some releases of transformers take sdpa for Gemma 2, without its softcap.
    model = tiny_model(family, attn_implementation="eager")
    assert not step_on_meta(make_trainer(model, layout=layout))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"tokens_per_pack": 40},
        {"head_max_bytes": 2**21},
        {"use_weighting": True},
        {"impl": "recompute"},
        {"precompute_ref_log_probs": True},
    ],
    ids=str,
)
def test_options(options, make_trainer):
    assert not step_on_meta(make_trainer(**options))


def test_lora(make_trainer):
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    assert not step_on_meta(make_trainer(peft_config=lora))


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_unpaired(loss, tmp_path, tiny_model, shifted, unpaired):
    settings = UnpairedConfig(
        output_dir=str(tmp_path), loss_type=loss, use_cpu=True, per_device_train_batch_size=4
    )
    trainer = UnpairedTrainer(tiny_model(), copy.deepcopy(shifted), settings, unpaired())
    assert not step_on_meta(trainer)


def test_completions(tmp_path, tiny_model, pairs):
    rows = pairs().rename_column("chosen_ids", "completion_ids").remove_columns("rejected_ids")
    settings = SftConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    assert not step_on_meta(SftTrainer(tiny_model(), settings, rows))


def test_rewards(tmp_path, tiny_model, pairs):
    tiny_model().save_pretrained(tmp_path / "model")
    settings = RewardConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, per_device_train_batch_size=4
    )
    model = load_reward_model(str(tmp_path / "model"))
    assert not step_on_meta(RewardTrainer(model, settings, pairs()))
