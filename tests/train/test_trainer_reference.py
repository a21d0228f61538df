"""Where the reference comes from: a copy, a model, an adapter switched off or kept, the cache."""

from __future__ import annotations

import copy
import json
import logging
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastdaa.train import references
from fastdaa.train.adapters import REF_ADAPTER
from fastdaa.train.backbone import causal_lm

LN2 = float(np.float32(np.log(2)))


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")

    def build(**options):
        settings = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
        return peft.LoraConfig(task_type="CAUSAL_LM", **settings)

    return build


@pytest.fixture
def trained_adapter(tiny_model, lora):
    """``trained_adapter(**lora)``: a model with an adapter that is not at its start."""
    from peft import get_peft_model

    def build(**options):
        torch.manual_seed(3)
        model = get_peft_model(tiny_model(), lora(**options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" not in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return build


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def first(trainer):
    return trainer.state.log_history[0]


def last(trainer):
    """The last row with a loss: the policy has moved by then."""
    return [row for row in trainer.state.log_history if "loss" in row][-1]


def reference_logps(row):
    return row["logps/chosen"] - row["displacement/chosen"]


def assert_reference_is(model, trainer, naive, data):
    """The reference numbers of the last step are those of ``model``."""
    rows = list(data)[-4:]
    with torch.no_grad():
        chosen, _ = naive(model).logps(rows)
    row = last(trainer)
    assert reference_logps(row) == pytest.approx(chosen.mean().item(), abs=1e-4)
    assert abs(row["displacement/chosen"]) > 1e-3


def test_a_frozen_copy_stays_where_it_was(make_trainer, tiny_model, naive, pairs):
    data, model = pairs(8), tiny_model()
    trainer = make_trainer(model=model, data=data, max_steps=2)
    trainer.train()
    assert_reference_is(tiny_model(), trainer, naive, data)
    assert not any(p.requires_grad for p in trainer.reference.model.parameters())
    assert not trainer.reference.model.training


def test_a_second_model_as_object_or_folder(make_trainer, tiny_model, naive, pairs, tmp_path):
    data, ref = pairs(8), tiny_model(initializer_range=0.2)
    ref.save_pretrained(tmp_path / "ref")
    rows = []
    for given in (copy.deepcopy(ref), str(tmp_path / "ref")):
        trainer = make_trainer(data=data, ref_model=given, max_steps=2)
        trainer.train()
        assert_reference_is(ref, trainer, naive, data)
        rows.append(last(trainer)["loss"])
    assert rows[0] == rows[1]


def test_the_policy_given_as_its_own_reference_means_its_start(make_trainer, tiny_model):
    model = tiny_model()
    trainer = make_trainer(model=model, ref_model=model)
    trainer.train()
    assert first(trainer)["loss"] == LN2
    assert all(p.requires_grad for p in model.parameters())


def test_the_reference_of_a_new_adapter_is_the_base_model(
    make_trainer, tiny_model, naive, pairs, lora
):
    data, base = pairs(8), tiny_model()
    trainer = make_trainer(model=base, data=data, peft_config=lora(), max_steps=2)
    before = weights_of(trainer.model)
    trainer.train()
    assert first(trainer)["loss"] == LN2
    assert_reference_is(tiny_model(), trainer, naive, data)
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n and ("lora_B" in n or n in moved)}
    assert any("lora_B" in name for name in moved)
    assert REF_ADAPTER not in trainer.model.peft_config


@pytest.mark.parametrize("dropped", [False, True], ids=["dropout", "no dropout"])
def test_dropout_of_an_adapter_that_is_off_is_said(make_trainer, lora, caplog, dropped):
    with caplog.at_level(logging.WARNING, "fastdaa"):
        make_trainer(peft_config=lora(lora_dropout=0.25), disable_dropout=dropped)
        make_trainer(peft_config=lora(), disable_dropout=True)
    said = [line for line in caplog.messages if line.startswith("lora_dropout: 0.25 is without")]
    assert len(said) == dropped and "lora_dropout: 0 " not in caplog.text


@pytest.mark.parametrize("start", ["new", "trained"])
def test_the_policy_drops_out_and_its_reference_does_not(
    make_trainer, pairs, tiny_model, trained_adapter, lora, start
):
    options = {"lora_dropout": 0.5}
    if start == "trained":
        given = {"model": trained_adapter(**options)}
    else:
        given = {"model": tiny_model(attention_dropout=0.5), "peft_config": lora(**options)}
    trainer = make_trainer(data=pairs(8), disable_dropout=False, **given)
    trainer.train()
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    scores = [trainer.reference.score(batch["packs"][0]).sequence_logps for _ in range(2)]
    assert torch.equal(*scores)
    losses = [trainer.compute_loss(trainer.model, batch).item() for _ in range(2)]
    assert losses[0] != losses[1]
    # Everything is as it was.
    assert all(module.training for module in trainer.model.modules())
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name and REF_ADAPTER not in name)


ADAPTERS = {
    "lora": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
}


@pytest.mark.filterwarnings("ignore:.*embedding layers")
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_new_and_trained_adapters_of_every_kind(
    make_trainer, tiny_model, naive, pairs, lora, trained_adapter, options
):
    data = pairs(8)
    new = make_trainer(data=data, peft_config=lora(**options), max_steps=2)
    new.train()
    assert first(new)["loss"] == LN2
    assert_reference_is(tiny_model(), new, naive, data)

    model = trained_adapter(**options)
    start = copy.deepcopy(model)
    trainer = make_trainer(model=model, data=data, max_steps=2)
    assert REF_ADAPTER in model.peft_config
    trainer.train()
    assert first(trainer)["loss"] == LN2
    assert_reference_is(start.eval(), trainer, naive, data)


def test_other_adapters_go_pefts_own_way(make_trainer, tiny_model, naive, pairs):
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    data = pairs(8)
    trainer = make_trainer(data=data, peft_config=config, max_steps=2, learning_rate=0.1)
    trainer.train()
    assert first(trainer)["loss"] == LN2
    assert_reference_is(tiny_model(), trainer, naive, data)
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable and all(f".{REF_ADAPTER}" not in name for name in trainable)


def test_the_frozen_copy_of_an_adapter_is_not_saved(make_trainer, trained_adapter, tmp_path):
    trainer = make_trainer(model=trained_adapter(), save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert not (folder / REF_ADAPTER).exists()
        keys = load_file(folder / "adapter_model.safetensors").keys()
        assert keys and not [key for key in keys if REF_ADAPTER in key.split(".")]
    assert REF_ADAPTER in trainer.model.peft_config


def test_a_second_trainer_starts_from_the_adapter_as_it_is_now(
    make_trainer, trained_adapter, naive, pairs
):
    data, model = pairs(8), trained_adapter()
    make_trainer(model=model, data=data, max_steps=2).train()
    start = copy.deepcopy(model)
    trainer = make_trainer(model=model, data=data, max_steps=2)
    trainer.train()
    assert first(trainer)["loss"] == LN2
    start.delete_adapter(REF_ADAPTER)
    assert_reference_is(start.eval(), trainer, naive, data)


@pytest.fixture
def reference_pairs(monkeypatch):
    """Pairs that any reference model has scored, so far."""
    seen = []
    score = references.score_pack

    def counting(model, pack, **options):
        seen.append(len(pack["counts"]) // 2)
        return score(model, pack, **options)

    monkeypatch.setattr(references, "score_pack", counting)
    return seen


CACHED = {
    "copy": {},
    "second model": {"second": True},
    "new adapter": {"adapter": "new"},
    "trained adapter": {"adapter": "trained"},
}


@pytest.mark.parametrize("case", CACHED.values(), ids=CACHED)
def test_cached_log_probs_train_as_the_model_does(
    make_trainer, tiny_model, pairs, lora, trained_adapter, losses_of, case
):
    def build(**options):
        if case.get("second"):
            options["ref_model"] = tiny_model(initializer_range=0.2)
        if case.get("adapter") == "new":
            options["peft_config"] = lora()
        if case.get("adapter") == "trained":
            options["model"] = trained_adapter()
        trainer = make_trainer(data=pairs(8), eval_dataset=pairs(6, seed=1), max_steps=2, **options)
        trainer.train()
        return trainer

    online, cached = build(), build(precompute_ref_log_probs=True)
    assert losses_of(cached) == pytest.approx(losses_of(online), abs=1e-6)
    rows = online.evaluate(), cached.evaluate()
    assert rows[0].keys() - rows[1].keys() == {"eval_kl/token", "eval_kl/sequence"}
    unlike = ("eval_throughput", "eval_memory", "eval_runtime", "eval_samples", "eval_steps")
    for name in rows[1]:
        if not name.startswith(unlike):
            assert rows[1][name] == pytest.approx(rows[0][name], abs=1e-5), name
    assert reference_logps(last(cached)) == pytest.approx(reference_logps(last(online)), abs=1e-5)


def test_nothing_is_computed_twice(make_trainer, pairs, reference_pairs, lora, tmp_path):
    data, evaluation = pairs(8), pairs(6, seed=1)
    make_trainer(data=data, eval_dataset=evaluation, precompute_ref_log_probs=True).train()
    assert sum(reference_pairs) == 14
    del reference_pairs[:]
    shuffled = data.shuffle(seed=1).select(range(5))
    others = (
        {"beta": 0.5, "output_dir": str(tmp_path / "other")},
        {"loss_type": ["ipo"], "layout": "padded", "tokens_per_pack": 20},
        {"per_device_train_batch_size": 2, "disable_dropout": False, "data": shuffled},
        {"peft_config": lora()},
    )
    for options in others:
        options = {"data": data, "eval_dataset": {"a": evaluation}, **options}
        trainer = make_trainer(precompute_ref_log_probs=True, **options)
        trainer.train()
    assert not reference_pairs


def test_another_reference_or_precision_is_computed_again(
    make_trainer, tiny_model, pairs, reference_pairs, trained_adapter
):
    for options in (
        {},
        {"ref_model": tiny_model(initializer_range=0.2)},
        {"bf16": True},
        {"model": trained_adapter()},
    ):
        make_trainer(data=pairs(8), precompute_ref_log_probs=True, **options)
        assert sum(reference_pairs) == 8
        del reference_pairs[:]


def test_token_log_probs_come_from_the_cache_too(make_trainer, pairs, losses_of, reference_pairs):
    options = {"data": pairs(8), "loss_type": ["apa_pairs"], "max_steps": 2}
    online = make_trainer(**options)
    online.train()
    del reference_pairs[:]
    make_trainer(data=pairs(8), precompute_ref_log_probs=True)
    assert sum(reference_pairs) == 8  # sums only, which are not enough
    cached = make_trainer(**options, precompute_ref_log_probs=True, tokens_per_pack=20)
    assert sum(reference_pairs) == 16
    cached.train()
    assert losses_of(cached) == pytest.approx(losses_of(online), rel=1e-5)
    make_trainer(**options, precompute_ref_log_probs=True)
    make_trainer(data=pairs(8), precompute_ref_log_probs=True)
    assert sum(reference_pairs) == 16


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_keeps_what_was_computed(
    make_trainer, pairs, monkeypatch, reference_pairs, error
):
    score, calls = references.score_pack, []

    def failing(model, pack, **options):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return score(model, pack, **options)

    options = {"data": pairs(8), "precompute_ref_log_probs": True, "precompute_ref_batch_size": 2}
    monkeypatch.setattr(references, "score_pack", failing)
    with pytest.raises(error):
        make_trainer(**options)
    assert sum(reference_pairs) == 4
    make_trainer(**options)
    assert sum(reference_pairs) == 8


def test_no_reference_model_is_kept_with_cached_log_probs(make_trainer, pairs, monkeypatch):
    def refused(model):
        raise AssertionError("a copy was made")

    monkeypatch.setattr(references, "frozen_copy", refused)
    with pytest.raises(AssertionError, match="a copy was made"):
        make_trainer()
    trainer = make_trainer(data=pairs(8), precompute_ref_log_probs=True)
    assert not hasattr(trainer.reference, "model")
    assert trainer.accelerator._models == []
    trainer.train()


def test_a_second_reference_model_is_freed_after_precomputing(make_trainer, tiny_model, pairs):
    import gc
    import weakref

    ref = tiny_model(initializer_range=0.2)
    alive = weakref.ref(ref)
    trainer = make_trainer(data=pairs(8), ref_model=ref, precompute_ref_log_probs=True)
    del ref
    gc.collect()
    assert alive() is None
    trainer.train()


def test_an_evaluation_set_that_comes_later(make_trainer, pairs):
    later = pairs(6, seed=1)
    trainer = make_trainer()
    assert "eval_kl/token" in trainer.evaluate(later)
    assert {"eval_a_loss", "eval_b_loss"} <= trainer.evaluate({"a": later, "b": later}).keys()
    cached = make_trainer(precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="eval_dataset: expected a dataset that the trainer was"):
        cached.evaluate(later)
    columns = {"ref_chosen_logps": [-1.0] * 6, "ref_rejected_logps": [-2.0] * 6}
    for name, values in columns.items():
        later = later.add_column(name, values)
    moved = cached.evaluate(later)
    assert moved["eval_displacement/chosen"] == pytest.approx(moved["eval_logps/chosen"] + 1)


def test_evaluation_before_training_uses_mixed_precision(make_trainer, pairs):
    trainer = make_trainer(eval_dataset=pairs(4), bf16=True)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == LN2 and metrics["eval_kl/token"] == 0.0


def test_the_adapter_is_saved_and_the_base_model_is_not(make_trainer, lora, tmp_path):
    trainer = make_trainer(peft_config=lora())
    trainer.train()
    trainer.save_model()
    files = os.listdir(tmp_path / "out")
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert causal_lm(trainer.model) is trainer.model.get_base_model()


@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
def test_log_probs_that_come_with_the_data_are_said_not_to_be_read(
    make_trainer, pairs, caplog, part
):
    rows = pairs().add_column("ref_chosen_logps", [-90.0] * 8)
    rows = rows.add_column("ref_rejected_logps", [-9.0] * 8)
    given = {"data": rows} if part == "train_dataset" else {"eval_dataset": {"a": rows}}
    with caplog.at_level(logging.WARNING, "fastdaa"):
        trainer = make_trainer(**given)
        make_trainer(**given, loss_type="simpo")  # has no reference
    said = [line for line in caplog.messages if "ref_chosen_logps and ref_rejected_logps" in line]
    assert len(said) == 1 and said[0].startswith(f"{part}{' a' if 'eval' in part else ''}: its ")
    trainer.train()
    assert first(trainer)["loss"] == LN2
