"""``use_weighting`` and ``ld_alpha`` in the trainer: by hand, in every layout, cached, adapted."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastdaa.train import PreferenceConfig
from fastdaa.train.run_record import RUN_FILE

BETA, ALPHA = 0.4, 0.3
BOTH = {"use_weighting": True, "ld_alpha": ALPHA, "beta": BETA}
SIDES = ("chosen_ids", "rejected_ids")


def by_hand(naive, model, ref, data):
    """Mean loss of WPO with LD-DPO, and the mean weight; sequence by sequence, on whole logits."""
    losses, weights = [], []
    for row in data:
        shared = min(len(row[side]) for side in SIDES)
        ratios, mean = [], 0.0
        for side in SIDES:
            logps = naive(model).token_logps(row, side)
            with torch.no_grad():
                squares = naive(model).logits(row, side).softmax(-1).square().sum(-1)
                mean += float((logps - squares.log()).mean())
                reference = naive(ref).token_logps(row, side)
            moved = logps - reference
            ratios.append(moved[:shared].sum() + ALPHA * moved[shared:].sum())
        weights.append(min(1.0, math.exp(mean)))
        losses.append(-weights[-1] * F.logsigmoid(BETA * (ratios[0] - ratios[1])))
    return torch.stack(losses).mean(), sum(weights) / len(weights)


def first(trainer):
    return trainer.state.log_history[0]


LAYOUTS = {
    "prefix_shared": {"layout": "prefix_shared"},
    "packed": {"layout": "packed"},
    "padded": {"layout": "padded"},
    "packs": {"layout": "packed", "tokens_per_pack": 40},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "chunks": {"head_max_bytes": 1 << 16},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_loss_gradients_and_weights_by_hand(one_step, tiny_model, pairs, naive, options):
    data, ref = pairs(8), tiny_model(initializer_range=0.2)
    options = {"per_device_train_batch_size": 8, **options}
    grads, trainer = one_step(data=data, ref_model=ref, **BOTH, **options)
    model = tiny_model()
    loss, weight = by_hand(naive, model, ref, data)
    loss.backward()
    row = first(trainer)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["weights/mean"] == pytest.approx(weight, rel=1e-4) and 0 < weight < 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("more", [{"use_weighting": True}, {"ld_alpha": ALPHA}], ids=str)
def test_each_changes_the_training(one_step, pairs, more):
    data = pairs(8)
    plain, without = one_step(data=data)
    changed, trainer = one_step(data=data, **more)
    assert ("weights/mean" in first(trainer)) == ("use_weighting" in more)
    assert "weights/mean" not in first(without)
    assert not torch.allclose(changed["lm_head.weight"], plain["lm_head.weight"], rtol=0.1)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_cached_references_and_evaluation(make_trainer, pairs, losses_of, adapter):
    def build(**options):
        if adapter:
            peft = pytest.importorskip("peft")
            options["peft_config"] = peft.LoraConfig(
                task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]
            )
        trainer = make_trainer(
            data=pairs(8), eval_dataset=pairs(6, seed=1), max_steps=2, learning_rate=0.05,
            **BOTH, **options,
        )  # fmt: skip
        trainer.train()
        return trainer

    online, cached = build(), build(precompute_ref_log_probs=True)
    assert losses_of(cached) == pytest.approx(losses_of(online), abs=1e-6)
    rows = online.evaluate(), cached.evaluate()
    names = [f"eval_{name}" for name in cached.own_metric_names()]
    assert "eval_weights/mean" in names
    for name in names:
        if not name.startswith(("eval_throughput", "eval_memory")):
            assert rows[1][name] == pytest.approx(rows[0][name], abs=1e-5), name
    assert rows[0]["eval_rewards/margins"] != 0
    # Sums alone would not tell what a tail counts.
    sums = pairs(8).add_column("ref_chosen_logps", [0.0] * 8)
    with pytest.raises(ValueError, match="ref_chosen_token_logps, ref_rejected_token_logps: with"):
        cached.evaluate(sums.add_column("ref_rejected_logps", [0.0] * 8))


def test_a_cache_is_shared_between_alphas(make_trainer, pairs, tmp_path):
    for alpha in (0.2, 0.9):
        make_trainer(data=pairs(8), ld_alpha=alpha, precompute_ref_log_probs=True).train()
    parts = [load_file(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert [len(part["keys"]) for part in parts] == [8] and "token_logps" in parts[0]


def test_rewards_are_what_is_compared_and_other_names_count_all_tokens(
    make_trainer, tiny_model, pairs, naive
):
    data, ref = pairs(4), tiny_model(initializer_range=0.2)
    trainer = make_trainer(data=data, ref_model=ref, ld_alpha=0.0, beta=BETA)
    trainer.train()
    row, model = first(trainer), tiny_model()
    sums = {"policy": 0.0, "ref": 0.0, "shared": 0.0, "shared ref": 0.0}
    with torch.no_grad():
        for pair in data:
            shared = min(len(pair[side]) for side in SIDES)
            for name, scored in (("policy", model), ("ref", ref)):
                logps = naive(scored).token_logps(pair, "chosen_ids")
                sums[name] += logps.sum().item() / 4
                key = "shared" if name == "policy" else "shared ref"
                sums[key] += logps[:shared].sum().item() / 4
    assert sums["policy"] != pytest.approx(sums["shared"], abs=0.1)
    assert row["logps/chosen"] == pytest.approx(sums["shared"], abs=1e-4)
    compared = BETA * (sums["shared"] - sums["shared ref"])
    assert row["rewards/chosen"] == pytest.approx(compared, abs=1e-4)
    moved = sums["policy"] - sums["ref"]
    assert row["displacement/chosen"] == pytest.approx(moved, abs=1e-4)


def test_the_best_model_may_be_chosen_by_the_weight(make_trainer, pairs):
    trainer = make_trainer(
        data=pairs(8), eval_dataset=pairs(4), eval_strategy="steps", eval_steps=1, save_steps=1,
        save_strategy="steps", metric_for_best_model="weights/mean", load_best_model_at_end=True,
        greater_is_better=True, use_weighting=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == trainer.state.log_history[1]["eval_weights/mean"]


def test_the_run_and_its_card_say_so(make_trainer, pairs, tmp_path):
    trainer = make_trainer(data=pairs(8), save_strategy="steps", save_steps=1, **BOTH)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ld_alpha=0.3, use_weighting`" in card
    assert "[arXiv 2406.11827]" in card and "[arXiv 2409.06411]" in card
    record = json.loads((tmp_path / "out" / "checkpoint-1" / RUN_FILE).read_text())
    assert "ld_alpha=0.3, use_weighting" in json.dumps(record)
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected the run of"):
        make_trainer(data=pairs(8), beta=BETA, max_steps=2).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1")
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"ld_alpha": 1.5}, r"ld_alpha: expected a number in \[0, 1\]", id="alpha"),
        pytest.param(
            {"ld_alpha": 0.5, "loss_type": "simpo"},
            "ld_alpha: expected a loss that compares the log-probs of sequences with a reference",
            id="no reference",
        ),
        pytest.param(
            {"use_weighting": True, "loss_type": ["dpo", "aot"]},
            "use_weighting: expected losses of single pairs, got aot",
            id="sorted",
        ),
        pytest.param(
            {"ld_alpha": 0.5, "loss_kwargs": {"ld_alpha": 0.6}},
            "ld_alpha: expected it once, got ld_alpha=0.5 and 0.6 in loss_kwargs",
            id="twice",
        ),
        pytest.param(
            {"use_weighting": True, "loss_kwargs": {"use_weighting": True}},
            "use_weighting: expected it once",
            id="weighting twice",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, **fields)


def test_settings_reach_the_objective(tmp_path):
    config = PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, ld_alpha=0, loss_type="kto")
    assert config.objective().ld_alpha == 0.0 and not config.objective().use_weighting
    again = PreferenceConfig(
        output_dir=str(tmp_path), use_cpu=True, loss_kwargs='{"ld_alpha": 0.5}', use_weighting=True
    )
    assert again.objective().ld_alpha == 0.5 and again.objective().use_weighting


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(run, run_two, tmp_path, pairs):
    options = {
        "pairs": pairs(24).to_list(), "save_strategy": "no", "optim": "sgd", "learning_rate": 0.3,
        "precompute_ref_log_probs": True, **BOTH,
    }  # fmt: skip
    cache = {name: str(tmp_path / name) for name in ("one", "two")}
    alone = {"per_device_train_batch_size": 8, "ref_cache_dir": cache["one"] + " cache"}
    assert run(tmp_path / "one", **options, **alone) == 0
    assert run_two(tmp_path / "two", ref_cache_dir=cache["two"] + " cache", **options) == [0, 0]
    got, expected = (load_file(tmp_path / name / "final.safetensors") for name in ("two", "one"))
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=1e-5)
