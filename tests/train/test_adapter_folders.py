"""An adapter's folder as the model: trained further on its base, never dropped without a word."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fastdaa.cli import paths
from fastdaa.train.adapter_files import load_causal_lm

peft = pytest.importorskip("peft")


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """The folder of an adapter that changes its base, whose folder is beside it."""
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    loaded = type(base).from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(5)
    model = peft.get_peft_model(loaded, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_it_is_what_is_trained_and_compared_with(adapter, make_trainer, naive, pairs, tmp_path):
    trainer = make_trainer(model=str(adapter), max_steps=1, learning_rate=0.0, data=pairs(4))
    data = pairs(4)
    trainer.train()
    trainer.save_model()
    row = trainer.state.log_history[0]
    with torch.no_grad():
        start = naive(load_causal_lm(str(adapter)).eval()).logps(data)[0].mean().item()
        base = naive(load_causal_lm(str(tmp_path / "base")).eval()).logps(data)[0].mean().item()
    assert row["logps/chosen"] == pytest.approx(start, rel=1e-5)
    assert abs(start - base) > 0.01
    assert row["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    saved, before = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", adapter)
    )
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_only_the_adapter_moves(adapter, make_trainer):
    trainer = make_trainer(model=str(adapter), max_steps=1)
    trainer.train()
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name and "default" in name for name in trained)


def test_another_adapter_does_not_take_its_place(adapter, make_trainer):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match=r"without adapters beside a new one .* got one with 'default'"
    ):
        make_trainer(model=str(adapter), peft_config=config)
    # Nor of one that transformers has put into the model.
    from transformers import AutoModelForCausalLM

    native = AutoModelForCausalLM.from_pretrained(adapter)
    with pytest.raises(ValueError, match="without adapters beside a new one"):
        make_trainer(model=native, peft_config=config)


def test_a_run_from_another_adapter_is_another_run(adapter, make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(model=str(adapter), **options).train()
    again = make_trainer(model=str(adapter), max_steps=2, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    other = str(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"expected the run of .*reference 'float32 \w+' then"):
        make_trainer(model=other, max_steps=3, **options).train(resume_from_checkpoint=True)


def test_it_can_be_the_reference(adapter, make_trainer, naive, pairs, tiny_model):
    data = pairs(4)
    trainer = make_trainer(model=tiny_model(), ref_model=str(adapter), data=data)
    trainer.train()
    with torch.no_grad():
        policy, reference = (
            naive(model.eval()).logps(data)
            for model in (tiny_model(), load_causal_lm(str(adapter)))
        )
    expected = 0.1 * (policy[0] - reference[0]).mean().item()
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(expected, rel=1e-4)


def test_a_base_that_is_gone_is_named(adapter, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(OSError, match=f"model: .*{adapter}.*{tmp_path}/base"):
        paths.check_model("model", str(adapter))


def test_its_cached_log_probs_are_not_the_bases(adapter, make_trainer, tiny_model, tmp_path):
    found = []
    for reference in (str(tmp_path / "base"), str(adapter)):
        for cached in (True, False):
            trainer = make_trainer(
                model=tiny_model(), ref_model=reference, precompute_ref_log_probs=cached
            )
            trainer.train()
            found.append(trainer.state.log_history[0]["rewards/margins"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[2] == pytest.approx(found[3], abs=1e-5)
    assert abs(found[0] - found[2]) > 1e-3
