"""The drop-in's KTO trainer gives TRL's losses, metrics and gradients, step by step."""

from __future__ import annotations

import functools

import pytest
import torch
from drop_in.trl_runs import compare, compare_rows
from head_products import HeadProducts

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = {
    "kto": {"desirable_weight": 1.3, "undesirable_weight": 0.6},
    "apo-zero-unpaired": {"loss_type": "apo_zero_unpaired"},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "synchronised": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


@pytest.fixture
def make_kto(make_trainer):
    return functools.partial(make_trainer, "KTO")


@pytest.mark.parametrize("settings", SETTINGS)
def test_full_training_is_that_of_trl(make_kto, trl, drop_in, saved, settings):
    def options():
        return {"model": saved(), "settings": SETTINGS[settings]}

    trainer = compare(make_kto, trl.KTOTrainer, drop_in.KTOTrainer, options)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["rewards/chosen"] == 0 and abs(rows[-1]["rewards/chosen"]) > 1e-2
    # Without one, the baseline is 0.
    assert (rows[-1]["kl"] > 0) == (settings != "apo-zero-unpaired")


def test_another_reference_model_whose_kl_counts(make_kto, trl, drop_in, new_model):
    """The baseline, of mismatched completions, goes into the loss from the first step on."""

    def options():
        return {"ref_model": new_model(seed=1), "settings": {"learning_rate": 3e-3}}

    trainer = compare(make_kto, trl.KTOTrainer, drop_in.KTOTrainer, options)
    assert max(row.get("kl", 0) for row in trainer.state.log_history) > 1e-2


@pytest.mark.parametrize("precompute", [False, True], ids=["online", "precomputed"])
def test_new_adapter(make_kto, trl, drop_in, precompute):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def options():
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False
        )
        return {"peft_config": lora, "settings": {"precompute_ref_log_probs": precompute}}

    trainer = compare(make_kto, trl.KTOTrainer, drop_in.KTOTrainer, options)
    # The adapter starts at random numbers, so the reference is the model without it.
    assert abs(trainer.state.log_history[0]["rewards/chosen"]) > 1e-3


def test_mixture_of_experts(make_kto, trl, drop_in, saved):
    def options():
        sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
        return {"model": saved(family="Mixtral", **sizes)}

    trainer = compare(make_kto, trl.KTOTrainer, drop_in.KTOTrainer, options)
    assert trainer.state.log_history[0]["aux_loss"] > 0


def test_evaluation(make_kto, trl, drop_in, saved, data):
    rows = []
    for trainer_class in (trl.KTOTrainer, drop_in.KTOTrainer):
        settings = {"max_steps": 1}
        evaluated = data["KTO"].select(range(6))
        trainer = make_kto(trainer_class, saved(), settings, eval_dataset=evaluated)
        trainer.train()
        rows.append(trainer.evaluate())
    compare_rows(rows[1:], rows[:1])


def test_precomputed_log_probs_of_trls_head_are_not_read(make_kto, trl, drop_in, saved):
    settings = {"precompute_ref_log_probs": True}
    theirs, ours = (
        make_kto(trainer_class, saved(), settings)._precompute_model_hash
        for trainer_class in (trl.KTOTrainer, drop_in.KTOTrainer)
    )
    assert ours == f"fastdaa-{theirs}"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_products(make_kto, drop_in, saved, lora, adapter):
    """3U, or 2U of a frozen head; beside it 1U for the reference, and the same for the baseline."""
    trainer = make_kto(drop_in.KTOTrainer, saved(), **adapter(lora))
    ids = torch.randint(4, 44, (4, 12))
    mask = (torch.arange(12) >= 4).long().expand(4, 12)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask,
        "KL_input_ids": ids.flip(0), "KL_attention_mask": torch.ones_like(ids),
        "KL_completion_mask": mask, "label": torch.tensor([True, False, True, True]),
    }  # fmt: skip
    with HeadProducts(44) as products:
        trainer.compute_loss(trainer.model, batch).backward()
    tokens = int(mask.sum())
    weight = trainer.model.get_output_embeddings().weight
    assert products.flop / (2 * tokens * weight.numel()) == (2 if lora else 3) + 1 + 2
