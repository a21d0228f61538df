"""The head of the drop-in trainers: its products, its memory, and what stays TRL's."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect

import pytest
import torch
from datasets import Dataset
from drop_in.trl_runs import compare
from head_products import HeadProducts
from torch.multiprocessing.reductions import StorageWeakRef

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_head_is_that_of_fastdaa_and_trl_keeps_its_own(make_dpo, trl, ours, saved, monkeypatch):
    from trl.trainer import dpo_trainer, utils

    from fastdaa.drop_in.trl import head

    scored = []
    real = head.head_logps_and_stats
    monkeypatch.setattr(
        head, "head_logps_and_stats",
        lambda *args, **options: scored.append(args[0].requires_grad) or real(*args, **options),
    )  # fmt: skip
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)  # TRL's head would fail
    make_dpo(ours, model=saved(), settings={"max_steps": 2}).train()
    assert scored == [True, False, True, False]
    assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head


def head_units(trainer):
    """Products of policy and reference in a step, in units of ``2 N V D`` FLOP each."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    weight = trainer.model.get_output_embeddings().weight
    with HeadProducts(weight.shape[0]) as products:
        trainer.compute_loss(trainer.model, batch).backward()
    tokens = int(batch["completion_mask"].sum())
    assert tokens == 8 * len(batch["completion_mask"])
    return products.flop / (2 * tokens * weight.numel())


@pytest.fixture
def even_texts():
    """8 scored tokens a completion: products on CPU are filled up to 16 rows otherwise."""
    text = " ".join(f"w{i}" for i in range(7))
    return Dataset.from_list(
        [{"prompt": f"w{i} w8", "chosen": " " + text, "rejected": f" w{i}" * 7} for i in range(4)]
    )


TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


def test_products_of_a_trained_head_whatever_the_loss(make_dpo, ours, saved, even_texts):
    """3U, and 1U for the reference."""
    settings = {"label_smoothing": 0.1, "ld_alpha": 0.4, "loss_weights": [1.0]}
    trainer = make_dpo(ours, model=saved(), settings=settings, train_dataset=even_texts)
    units = {}
    for name in TYPES:
        trainer.loss_types = [name]
        units[name] = head_units(trainer)
    assert units == dict.fromkeys(TYPES, 3 + 1)


def test_what_offloading_would_send_to_the_host_is_not_kept(
    make_dpo, ours, saved, even_texts, monkeypatch
):
    from trl.trainer import dpo_trainer

    # TRL's hooks need an accelerator.
    monkeypatch.setattr(
        dpo_trainer, "get_act_offloading_ctx_manager", lambda model: contextlib.nullcontext()
    )
    settings = {"activation_offloading": True}
    trainer = make_dpo(ours, model=saved(), settings=settings, train_dataset=even_texts)
    assert head_units(trainer) == 4 + 1


def test_products_with_weighting(make_dpo, ours, saved, even_texts):
    settings = {"use_weighting": True, "f_divergence_type": "forward_kl"}
    trainer = make_dpo(ours, model=saved(), settings=settings, train_dataset=even_texts)
    assert head_units(trainer) == 3 + 1


def test_products_of_a_frozen_head(make_dpo, ours, new_model, even_texts):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = make_dpo(ours, peft_config=lora, train_dataset=even_texts)
    assert head_units(trainer) == 2 + 1


@pytest.mark.parametrize(
    ("budget", "path"), [(1 << 13, "RecomputeBackward"), (1 << 20, "KeptLogpsBackward")]
)
def test_a_batch_that_does_not_fit_is_not_kept(
    make_dpo, trl, ours, saved, monkeypatch, budget, path
):
    """64 tokens over 44 entries take 11 KiB."""
    from fastdaa.drop_in.trl import head

    taken = set()
    real = head.head_logps_and_stats

    def recorded(*args, **options):
        logps, stats = real(*args, **options)
        taken.add(type(logps.grad_fn).__name__)
        return logps, stats

    monkeypatch.setattr(head, "head_logps_and_stats", recorded)
    budgeted = functools.partial(ours, head_max_bytes=budget)
    compare(make_dpo, trl.DPOTrainer, budgeted, lambda: {"model": saved()})
    assert taken == {path, "NoneType"}


@pytest.mark.parametrize("name", ["DPO", "KTO", "SFT", "GRPO", "RLOO"])
def test_an_accumulated_step_keeps_one_batch_at_a_time(
    make_trainer, drop_in, saved, monkeypatch, name
):
    from fastdaa import kept_logps

    waiting, calls, real = [], [], kept_logps.keep_logps

    def recorded(*args, **options):
        calls.append(sum(not storage.expired() for storage in waiting))
        values, state, kept = real(*args, **options)
        waiting.append(StorageWeakRef(kept.dz.untyped_storage()))
        calls.append(sum(not storage.expired() for storage in waiting))
        return values, state, kept

    monkeypatch.setattr(kept_logps, "keep_logps", recorded)
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2,
    }  # fmt: skip
    make_trainer(name, getattr(drop_in, f"{name}Trainer"), saved(), settings).train()
    assert calls == [0, 1] * 6


def test_other_calls_of_the_model_are_as_before(make_dpo, ours, saved):
    model = saved()
    ids = torch.tensor([[5, 9, 3, 7]])
    before = model(input_ids=ids, labels=ids)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    make_dpo(ours, model=model)
    after = model.eval()(input_ids=ids, labels=ids)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
    parameters = inspect.signature(model.forward).parameters
    assert {"input_ids", "labels"} <= parameters.keys()


def test_a_copy_of_the_model_has_its_own_weights(trl, new_model):
    from fastdaa.drop_in.trl.head import add_head

    model, ids = new_model(), torch.tensor([[5, 9, 3, 7]])
    add_head(model)
    kept = copy.deepcopy(model)
    before = model(input_ids=ids).logits
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(kept(input_ids=ids).logits, before)
    assert not model(input_ids=ids).logits.any()
