"""The drop-in's GRPO and RLOO trainers give TRL's losses, metrics and gradients, step by step.

Both sample from the same seed, and from models whose log-probs differ in the last bits alone.
"""

from __future__ import annotations

import functools

import pytest
import torch
from drop_in.trl_runs import compare, compare_rows
from head_products import HeadProducts

pytestmark = pytest.mark.filterwarnings("ignore")

OLD_LOGPS = {"steps_per_generation": 2, "num_iterations": 2, "epsilon": 0.05}
GRPO = {
    "dapo": {},
    "grpo-with-reference": {"loss_type": "grpo", "beta": 0.3},
    "bnpo-of-sequences": {"loss_type": "bnpo", "importance_sampling_level": "sequence"},
    "dr-grpo-used-twice": {"loss_type": "dr_grpo", **OLD_LOGPS},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", **OLD_LOGPS},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, **OLD_LOGPS},
    "sapo": {"loss_type": "sapo", **OLD_LOGPS},
    "vespo": {"loss_type": "vespo", **OLD_LOGPS},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "entropy-bonus": {"entropy_coef": 0.5},
    "entropy-bonus-on-few-tokens": {"entropy_coef": 0.5, "top_entropy_quantile": 0.4},
    "adaptive-entropy": {
        "use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    },
    "off-policy-mask": {"off_policy_mask_threshold": 0.02, **OLD_LOGPS},
    "corrected-kl": {"beta": 0.3, "use_bias_correction_kl": True, "delta": 1.1, **OLD_LOGPS},
    "synchronised": {"beta": 0.3, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "truncated": {"mask_truncated_completions": True, "gradient_checkpointing": True},
    "head-in-fp32": {"cast_lm_head_to_fp32": True},
}  # fmt: skip
RLOO = {
    "rloo": {},
    "used-twice": OLD_LOGPS,
    "without-reference": {"beta": 0.0, "normalize_advantages": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
CASES = [("GRPO", name, GRPO[name]) for name in GRPO] + [
    ("RLOO", name, RLOO[name]) for name in RLOO
]


@pytest.fixture(params=["GRPO", "RLOO"])
def trainers(request, trl, drop_in, make_trainer):
    """How to make one, TRL's class and ours."""
    name = request.param
    classes = (getattr(module, f"{name}Trainer") for module in (trl, drop_in))
    return functools.partial(make_trainer, name), *classes


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, settings) for name, _, settings in CASES],
    ids=[f"{name}-{case}" for name, case, _ in CASES],
)
def test_full_training_is_that_of_trl(make_trainer, trl, drop_in, saved, name, settings):
    theirs, ours = (getattr(module, f"{name}Trainer") for module in (trl, drop_in))
    make = functools.partial(make_trainer, name)
    trainer = compare(make, theirs, ours, lambda: {"model": saved(), "settings": settings})
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert max(row["grad_norm"] for row in rows) > 1e-2 and rows[0]["entropy"] > 0
    rewards = [row["reward"] for row in rows if "reward" in row]  # logged where it samples
    again = settings.get("num_iterations", 1) > 1
    assert len(rewards) == (1 if again else 3) and rewards[0] > 0
    if again and "clip_ratio/region_mean" in rows[-1]:
        # Samples of a policy that has changed since.
        assert rows[0]["clip_ratio/region_mean"] == 0 < rows[-1]["clip_ratio/region_mean"]


def test_new_adapter(trainers, new_model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    make, theirs, ours = trainers

    def options():
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False
        )
        return {"peft_config": lora, "settings": {"beta": 0.3}}

    trainer = compare(make, theirs, ours, options)
    # The adapter starts at random numbers, so the reference is the model without it.
    assert trainer.state.log_history[0]["kl"] != 0


def test_entropy_bonus_of_an_adapter(make_trainer, trl, drop_in):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def options():
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        return {"peft_config": lora, "settings": {"entropy_coef": 0.5}}

    compare(functools.partial(make_trainer, "GRPO"), trl.GRPOTrainer, drop_in.GRPOTrainer, options)


def test_mixture_of_experts(trainers, saved):
    make, theirs, ours = trainers

    def options():
        sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
        return {"model": saved(family="Mixtral", **sizes)}

    trainer = compare(make, theirs, ours, options)
    assert trainer.state.log_history[0]["aux_loss"] > 0


def test_evaluation(trainers, saved, data):
    make, theirs, ours = trainers
    rows = []
    for trainer_class in (theirs, ours):
        settings = {"max_steps": 1, "beta": 0.3}
        trainer = make(trainer_class, saved(), settings, eval_dataset=data["GRPO"].select(range(2)))
        trainer.train()
        rows.append(trainer.evaluate())
    assert "eval_reward" in rows[0]
    compare_rows(rows[1:], rows[:1])


@pytest.mark.parametrize(
    ("lora", "settings", "units"),
    [
        (False, {}, 3),
        (True, {}, 2),
        (False, {"loss_type": "cispo", "top_entropy_quantile": 0.5}, 3),
        (False, {"entropy_coef": 0.1}, 4),
        (True, {"entropy_coef": 0.1}, 3),
    ],
    ids=["full", "lora", "cispo", "entropy-bonus", "lora-entropy-bonus"],
)
def test_products(make_trainer, drop_in, lora, settings, units, adapter):
    trainer = make_trainer("GRPO", drop_in.GRPOTrainer, settings=settings, **adapter(lora))
    trainer.current_gradient_accumulation_steps = 1
    ids = torch.randint(4, 44, (4, 12))
    ones = torch.ones_like(ids)
    batch = {
        "prompt_ids": ids[:, :4], "prompt_mask": ones[:, :4], "completion_ids": ids[:, 4:],
        "completion_mask": ones[:, 4:], "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "num_items_in_batch": torch.tensor(32),
    }  # fmt: skip
    with HeadProducts(44) as products:
        trainer.compute_loss(trainer.model, batch).backward()
    weight = trainer.model.get_output_embeddings().weight
    assert products.flop / (2 * 32 * weight.numel()) == units
