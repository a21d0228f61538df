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


def moved(model):
    """The model with adapters that are no longer fresh."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape))
    return model


@pytest.mark.parametrize("fresh", [True, False])
def test_a_second_active_adapter_would_be_missing_in_the_reference(make_trainer, tiny_model, fresh):
    model = moved(adapted(tiny_model()))
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.set_adapter("second")
    if not fresh:
        moved(model)
    model.base_model.set_adapter(["default", "second"])
    for name, weight in model.named_parameters():
        weight.requires_grad_(".second." in name)
    with pytest.raises(ValueError, match=r"one active adapter, .* got default, second; merge"):
        make_trainer(model=model)
    make_trainer(model=model, ref_model=tiny_model())
    make_trainer(model=model, loss_type="simpo")


def test_a_merged_adapter_is_named_before_training(make_trainer, tiny_model):
    model = moved(adapted(tiny_model()))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged ones \(default\); call unmerge_adapter"):
        make_trainer(model=model)
    model.unmerge_adapter()
    make_trainer(model=model).train()


@pytest.mark.parametrize(
    "options", [{"layer_replication": [(0, 2), (1, 2)]}, {"bias": "all"}], ids=["layers", "bias"]
)
def test_what_an_adapter_did_to_its_base_is_done_once(make_trainer, tiny_model, options):
    model = moved(adapted(tiny_model(), **options))
    before = logits(model)
    trainer = make_trainer(model=model, max_steps=2)
    assert torch.equal(logits(model), before)
    trainer.train()
    with starting_point(model):
        assert torch.equal(logits(model), before)


def test_an_adapter_that_starts_within_a_sequence_is_not_packed(make_trainer, tiny_model):
    model = adapted(tiny_model(), alora_invocation_tokens=[5, 6], target_modules=["q_proj"])
    assert make_trainer(model=model).layout == "padded"
    with pytest.raises(ValueError, match=r"got 'prefix_shared' for LlamaForCausalLM: .*aLoRA"):
        make_trainer(model=model, layout="prefix_shared")
    model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.set_adapter("other")
    assert make_trainer(model=model).layout == "prefix_shared"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("AdaptionPrompt", {"adapter_len": 2, "adapter_layers": 1}),
        ("Lily", {"r": 4, "target_modules": ["q_proj"]}),
    ],
)
def test_an_adapter_with_a_forward_of_its_own_is_refused(make_trainer, tiny_model, kind, options):
    if not hasattr(peft, f"{kind}Config"):
        pytest.skip(f"this PEFT has no {kind}Config")
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(ValueError, match=r"weights such as LoRA, got [A-Z_]*, which"):
        make_trainer(model=model, ref_model=tiny_model())
