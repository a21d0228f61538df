"""The drop-in trainer gives TRL's losses, metrics and gradients, step by step."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from drop_in.trl_runs import compare, compare_rows

pytestmark = pytest.mark.filterwarnings("ignore")


LOSSES = {
    "sigmoid": {},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    "aot": {"loss_type": "aot"},
    "ld-dpo": {"ld_alpha": 0.4},
    "f-divergence": {"f_divergence_type": "js_divergence"},
    "wpo": {"use_weighting": True},
    "wpo-mixture": {"use_weighting": True, "loss_type": ["ipo", "bco_pair"], "ld_alpha": 0.4},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_full_training_is_that_of_trl(make_dpo, trl, ours, saved, loss):
    trainer = compare(
        make_dpo, trl.DPOTrainer, ours, lambda: {"model": saved(), "settings": LOSSES[loss]}
    )
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row]
    assert margins[0] == 0 and abs(margins[-1]) > 1e-2


OPTIONS = {
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "truncated": {"max_length": 8, "truncation_mode": "keep_start"},
    "synchronised": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_trl_work(make_dpo, trl, ours, saved, options):
    compare(
        make_dpo, trl.DPOTrainer, ours, lambda: {"model": saved(), "settings": OPTIONS[options]}
    )


def test_another_reference_model(make_dpo, trl, ours, new_model):
    trainer = compare(make_dpo, trl.DPOTrainer, ours, lambda: {"ref_model": new_model(seed=1)})
    assert abs(trainer.state.log_history[0]["rewards/margins"]) > 1e-2


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Qwen2", {"tie_word_embeddings": True}),
    ],
    ids=["softcap", "scale", "tied"],
)
def test_heads_of_other_families(make_dpo, trl, ours, saved, family, config):
    compare(make_dpo, trl.DPOTrainer, ours, lambda: {"model": saved(family=family, **config)})


@pytest.mark.parametrize("coefficient", [None, 0.5, 0.0], ids=["of-the-model", "own", "none"])
def test_mixture_of_experts(make_dpo, trl, ours, saved, coefficient):
    sizes = {"family": "Mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    settings = {"router_aux_loss_coef": coefficient}
    trainer = compare(
        make_dpo, trl.DPOTrainer, ours, lambda: {"model": saved(**sizes), "settings": settings}
    )
    assert ("aux_loss" in trainer.state.log_history[0]) == (coefficient != 0)


@pytest.mark.parametrize("precompute", [False, True], ids=["online", "precomputed"])
def test_new_adapter(make_dpo, trl, ours, precompute):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def options():
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
        )  # fmt: skip
        return {"peft_config": lora, "settings": {"precompute_ref_log_probs": precompute}}

    trainer = compare(make_dpo, trl.DPOTrainer, ours, options)
    # The adapter starts at random numbers, so the reference is the model without it.
    assert abs(trainer.state.log_history[0]["rewards/margins"]) > 1e-3


def test_adapter_trained_further(make_dpo, trl, ours, new_model):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def options():
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["v_proj"], init_lora_weights=False
        )
        torch.manual_seed(3)
        return {"model": peft.get_peft_model(new_model(), config)}

    trainer = compare(make_dpo, trl.DPOTrainer, ours, options)
    assert "ref" in trainer.model.peft_config
    assert trainer.state.log_history[0]["rewards/margins"] == 0


def test_evaluation(make_dpo, trl, ours, saved, texts):
    rows = []
    for trainer_class in (trl.DPOTrainer, ours):
        trainer = make_dpo(trainer_class, model=saved(), eval_dataset=texts.select(range(6)))
        trainer.train()
        rows.append(trainer.evaluate())
    compare_rows(rows[1:], rows[:1])


def test_precomputed_log_probs_of_trls_head_are_not_read(make_dpo, trl, ours, saved):
    """TRL's cache of them is named after the data and this hash."""
    settings = {"precompute_ref_log_probs": True}
    names = [
        make_dpo(trainer_class, model=saved(), settings=settings)._precompute_model_hash
        for trainer_class in (ours, ours, trl.DPOTrainer)
    ]
    assert names == [f"fastdaa-{names[2]}", f"fastdaa-{names[2]}", names[2]]


def test_the_block_of_the_page_runs(trl, new_model, tokenizer, tmp_path, monkeypatch, texts):
    page = Path(__file__).resolve().parents[2] / "docs" / "drop_in.md"
    (block,) = re.findall(r"^```python no-run: TRL[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S)
    new_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts.to_json(tmp_path / "pairs.jsonl")
    # What the page leaves to TRL wants a GPU.
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    monkeypatch.setattr(trl, "DPOConfig", functools.partial(trl.DPOConfig, **settings))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), done := {})
    assert done["trainer"].state.global_step == 1
