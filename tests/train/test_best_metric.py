"""``metric_for_best_model`` is compared with the metrics of an evaluation before any training."""

from __future__ import annotations

import pytest
import transformers
from transformers import TrainerCallback

from fastdaa.train import PreferenceTrainer
from fastdaa.train.reward import RewardTrainer
from fastdaa.train.sft import SftTrainer
from fastdaa.train.stage_config import RewardConfig, SftConfig

OPTIONS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
MODES = {
    "online reference": {},
    "no reference": {"loss_type": ["simpo"]},
    "cached reference": {"precompute_ref_log_probs": True},
    "no statistics": {"log_token_stats": False, "log_exact_kl": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_names_are_those_of_an_evaluation(make_trainer, pairs, mode):
    trainer = make_trainer(eval_dataset=pairs(4), **MODES[mode])
    names = [name.removeprefix("eval_") for name in trainer.evaluate()]
    assert sorted(trainer.metric_names()) == sorted(
        set(names) - {"epoch", "model_preparation_time"}
    )


def test_names_of_a_mixture_of_experts(make_trainer, tiny_model, pairs):
    model = tiny_model(
        "Mixtral", num_local_experts=2, num_experts_per_tok=1, output_router_logits=True
    )
    trainer = make_trainer(model=model, eval_dataset=pairs(2))
    names = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert set(trainer.metric_names()) == names - {"epoch", "model_preparation_time"}
    assert "aux_loss" in names


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_names_of_the_other_stages(tiny_model, pairs, tmp_path, stage):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    if stage == "sft":
        data = pairs(4).rename_column("chosen_ids", "completion_ids")
        trainer = SftTrainer(tiny_model(), SftConfig(**settings), data, data)
    else:
        config = transformers.LlamaConfig(**{**tiny_model().config.to_dict(), "num_labels": 1})
        model = transformers.LlamaForSequenceClassification(config)
        trainer = RewardTrainer(model, RewardConfig(**settings), pairs(4), pairs(4))
    names = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert set(trainer.metric_names()) == names - {"epoch", "model_preparation_time"}


@pytest.mark.parametrize("wanted", ["rewards/accuracies", "eval_rewards/accuracies", "loss", None])
def test_names_that_there_are(make_trainer, pairs, wanted):
    trainer = make_trainer(
        eval_dataset=pairs(2), load_best_model_at_end=True, metric_for_best_model=wanted, **OPTIONS
    )
    trainer.train()
    assert trainer.state.best_global_step == 1


@pytest.mark.parametrize(
    ("options", "wanted", "message"),
    [
        pytest.param({}, "accuracy", "rewards/accuracies.* got 'accuracy'", id="name"),
        pytest.param({}, "eval_accuracy", "'eval_' before it, got 'eval_accuracy'", id="prefix"),
        pytest.param({"loss_type": ["simpo"]}, "kl/token", "got 'kl/token'", id="no reference"),
        pytest.param(
            {"precompute_ref_log_probs": True}, "kl/sequence", "got 'kl/sequence'", id="cached"
        ),
        pytest.param({}, "track/score", "tracked is no part of an evaluation", id="tracked"),
        pytest.param(
            {"lr_scheduler_type": "reduce_lr_on_plateau", "load_best_model_at_end": False},
            "accuracy", "rewards/accuracies", id="schedule",
        ),
    ],
)  # fmt: skip
def test_told_before_training(make_trainer, pairs, options, wanted, message):
    given = {**OPTIONS, "load_best_model_at_end": True, **options}
    with pytest.raises(
        ValueError, match=f"metric_for_best_model: expected one of loss, .*{message}"
    ):
        make_trainer(eval_dataset=pairs(2), metric_for_best_model=wanted, **given)


def test_several_evaluation_sets(make_trainer, pairs):
    sets = {"near": pairs(2), "far": pairs(2, seed=1)}
    options = {**OPTIONS, "load_best_model_at_end": True, "eval_dataset": sets}
    for wanted in ("far_loss", "eval_far_loss"):
        make_trainer(metric_for_best_model=wanted, **options).train()
    for wanted in ("loss", None):
        with pytest.raises(ValueError, match=r"one of the sets \(near, far\), _ and one of loss"):
            make_trainer(metric_for_best_model=wanted, **options)


def test_best_without_evaluation(make_trainer):
    with pytest.raises(ValueError, match="expected an eval_strategy beside 'best', got none"):
        make_trainer(save_strategy="best", metric_for_best_model="loss")


def test_nothing_is_run_before_it_is_told(make_trainer, pairs, monkeypatch):
    monkeypatch.setattr(PreferenceTrainer, "_prepare_data", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match="metric_for_best_model"):
        make_trainer(eval_dataset=pairs(2), metric_for_best_model="x", **OPTIONS)


def test_a_metric_that_nobody_asks_for(make_trainer):
    """Without evaluation the name is never looked up."""
    make_trainer(metric_for_best_model="anything", callbacks=[TrainerCallback()]).train()
