"""The drop-in's SFT trainer gives TRL's losses, metrics and gradients, step by step."""

from __future__ import annotations

import functools

import pytest
import torch
from drop_in.trl_runs import compare, compare_rows
from head_products import HeadProducts

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = {
    "nll": {},
    "dft": {"loss_type": "dft"},
    "prompts-too": {"completion_only_loss": False},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "accumulated-per-batch": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "loss_type": "dft",
        "average_tokens_across_devices": False,
    },
    "packed": {"packing": True, "max_length": 24, "per_device_train_batch_size": 2},
    "checkpointed": {"gradient_checkpointing": True, "max_length": 8},
}  # fmt: skip


@pytest.fixture
def make_sft(make_trainer):
    return functools.partial(make_trainer, "SFT")


@pytest.mark.parametrize("settings", SETTINGS)
def test_full_training_is_that_of_trl(make_sft, trl, drop_in, settings):
    def options():
        return {"settings": SETTINGS[settings]}

    trainer = compare(make_sft, trl.SFTTrainer, drop_in.SFTTrainer, options)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("coefficient", [None, 0.0], ids=["of-the-model", "none"])
def test_mixture_of_experts(make_sft, trl, drop_in, new_model, coefficient):
    """Its loss is averaged over the batches of an accumulated step."""
    settings = {
        "router_aux_loss_coef": coefficient, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip

    def options():
        sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
        return {"model": new_model("Mixtral", **sizes), "settings": settings}

    trainer = compare(make_sft, trl.SFTTrainer, drop_in.SFTTrainer, options)
    assert ("aux_loss" in trainer.state.log_history[0]) == (coefficient is None)


@pytest.mark.parametrize("kind", ["lora", "prompt-tuning"])
def test_new_adapter(make_sft, trl, drop_in, kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def options():
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False
        )
        prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return {"peft_config": lora if kind == "lora" else prompt}

    compare(make_sft, trl.SFTTrainer, drop_in.SFTTrainer, options)


def test_evaluation_with_metrics_of_the_logits(make_sft, trl, drop_in, data):
    """They come from an ordinary forward, which the head leaves alone."""

    def mean_logit(predictions):
        return {"mean_logit": float(predictions.predictions.mean())}

    rows = []
    for trainer_class in (trl.SFTTrainer, drop_in.SFTTrainer):
        evaluated = data["SFT"].select(range(4))
        trainer = make_sft(
            trainer_class, eval_dataset=evaluated, compute_metrics=mean_logit,
            settings={"max_steps": 1},
        )  # fmt: skip
        trainer.train()
        rows.append(trainer.evaluate())
    assert abs(rows[0]["eval_mean_logit"]) > 1e-3
    compare_rows(rows[1:], rows[:1])


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_products(make_sft, drop_in, loss_type, lora, adapter):
    trainer = make_sft(drop_in.SFTTrainer, settings={"loss_type": loss_type}, **adapter(lora))
    ids = torch.randint(4, 44, (4, 13))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with HeadProducts(44) as products:
        trainer.compute_loss(trainer.model, batch).backward()
    weight = trainer.model.get_output_embeddings().weight
    assert products.flop / (2 * 48 * weight.numel()) == (2 if lora else 3)
