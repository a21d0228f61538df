"""Adapters whose start is not the base model, and bases that do not stay where they start."""

from __future__ import annotations

import pytest
import torch

from fastdaa.train.adapters import starting_point

peft = pytest.importorskip("peft")


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


def adapted(model, **options):
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], **options}
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_taken_out_of_the_base_is_taken_out_once(make_trainer, tiny_model, start):
    model = adapted(tiny_model(), init_lora_weights=start)
    before = logits(model)
    trainer = make_trainer(model=model, max_steps=2)
    assert torch.equal(logits(model), before)
    trainer.train()
    assert not torch.equal(logits(model), before)
    with starting_point(model):
        assert torch.equal(logits(model), before)


def test_the_copy_of_an_adapter_does_not_count_as_trained(make_trainer, tiny_model):
    # AdaLoRA refuses a second adapter that could be trained.
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=4, target_r=2, total_step=10
    )
    model = peft.get_peft_model(tiny_model(), config)
    before = logits(model)
    trainer = make_trainer(model=model, max_steps=2)
    trainer.train()
    with starting_point(model):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_base_that_is_trained_is_no_reference(make_trainer, tiny_model, bias):
    model = adapted(tiny_model("Qwen2"), bias=bias, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"frozen base .*q_proj.base_layer.bias first"):
        make_trainer(model=model)
    # Another model, or a loss without a reference, does not mind.
    make_trainer(model=model, ref_model=tiny_model("Qwen2"))
    make_trainer(model=model, loss_type="simpo")
