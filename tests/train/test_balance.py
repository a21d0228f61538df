"""The load-balancing loss of mixtures of experts, and the option that weighs it."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers
from datasets import Dataset

from fastdaa.train.backbone import install_head_task, run_head_task
from fastdaa.train.reward import RewardTrainer
from fastdaa.train.sft import SftTrainer
from fastdaa.train.stage_config import RewardConfig, SftConfig

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PACK = {"input_ids": torch.arange(3, 15)[None], "position_ids": torch.arange(12)[None]}


def trained(make_trainer, model, **options):
    """The rows of two steps with evaluations, and the weights behind them."""
    data = options.pop("data")
    trainer = make_trainer(
        model=model, data=data, eval_dataset=data, max_steps=2, learning_rate=0.1, optim="sgd",
        eval_strategy="steps", eval_steps=1, train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
    kept = [{k: row[k] for k in row if k.endswith("loss")} for row in rows]
    return kept, {name: p.detach() for name, p in trainer.model.named_parameters()}, trainer


@pytest.mark.parametrize("given", [0.5, 0.0])
def test_the_option_is_as_if_the_configuration_said_so(
    make_trainer, tiny_model, pairs, given, tmp_path
):
    asks = {"output_router_logits": bool(given), "router_aux_loss_coef": given}
    data = pairs(8)
    expected = trained(make_trainer, tiny_model("Mixtral", **EXPERTS, **asks), data=data)
    other = {"output_router_logits": not given, "router_aux_loss_coef": 0.3}
    model = tiny_model("Mixtral", **EXPERTS, **other)
    got = trained(make_trainer, model, data=data, router_aux_loss_coef=given)
    assert got[0] == expected[0]
    assert ("aux_loss" in got[0][0]) == bool(given)
    for name, weight in expected[1].items():
        assert torch.equal(got[1][name], weight), name
    got[2].save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["output_router_logits"] is (not given)
    # The model that was given is its user's again where nothing is asked for.
    make_trainer(model=model)
    assert (run_head_task(model, PACK, torch.sum).aux_loss is None) == bool(given)


def test_a_run_is_continued_with_the_same_weight(make_trainer, tiny_model):
    def make(weight):
        model = tiny_model("Mixtral", **EXPERTS)
        return make_trainer(
            model=model, router_aux_loss_coef=weight, max_steps=1, save_strategy="steps",
            save_steps=1,
        )  # fmt: skip

    make(0.1).train()
    with pytest.raises(ValueError, match=r"router_aux_loss_coef 0\.1 then, 0\.2 now"):
        make(0.2).train(resume_from_checkpoint=True)


def test_what_nobody_asks_for_is_said(make_trainer, tiny_model, caplog):
    caplog.set_level(logging.INFO, "fastdaa")
    make_trainer(model=tiny_model("Mixtral", **EXPERTS), router_aux_loss_coef=0.0)
    make_trainer(model=tiny_model("Mixtral", **EXPERTS, output_router_logits=True))
    make_trainer(model=tiny_model("Mixtral", **EXPERTS, router_aux_loss_coef=0.0))
    make_trainer()
    assert "router_aux_loss_coef" not in caplog.text
    make_trainer(model=tiny_model("Mixtral", **EXPERTS, router_aux_loss_coef=0.02))
    assert "is off in the configuration of MixtralForCausalLM; 0.02, which it has" in caplog.text


@pytest.mark.parametrize(
    ("coefficient", "message"),
    [
        (-0.1, "router_aux_loss_coef: expected 0 or more, got -0.1"),
        (0.1, "a mixture of experts that has a load-balancing loss, got 0.1 for LlamaForCausalLM"),
    ],
)
def test_weights_that_cannot_be(make_trainer, coefficient, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(router_aux_loss_coef=coefficient)


def test_a_model_without_experts_takes_no_weight(make_trainer):
    make_trainer(router_aux_loss_coef=0.0)


def test_classes_of_other_modules_have_the_loss_of_their_family(tiny_model):
    model = tiny_model("Mixtral", **EXPERTS, output_router_logits=True)
    install_head_task(model)
    expected = run_head_task(model, PACK, torch.sum).aux_loss
    # As FSDP2 does, and users that add something to a model.
    model.__class__ = type("Changed", (type(model),), {"__module__": __name__})
    assert torch.equal(run_head_task(model, PACK, torch.sum).aux_loss, expected)


def router_gradient(trainer):
    (batch,) = list(trainer.get_train_dataloader())
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1  # older releases read it
    trainer.training_step(trainer.model, batch)
    return trainer.model.model.layers[0].mlp.gate.weight.grad.clone()


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_stages_balance_experts(kind, tiny_model, tmp_path):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    tokens = {"prompt_ids": [3, 4, 5], "chosen_ids": [6, 7], "rejected_ids": [8, 9]}
    data = Dataset.from_list([tokens])
    if kind == "sft":
        data = data.rename_column("chosen_ids", "completion_ids").remove_columns("rejected_ids")

    def make(coefficient):
        settings = {
            "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none",
            "router_aux_loss_coef": coefficient,
        }  # fmt: skip
        language = tiny_model("Mixtral", **EXPERTS)
        if kind == "sft":
            return SftTrainer(language, SftConfig(**settings), train_dataset=data)
        language.config.num_labels = 1
        torch.manual_seed(0)
        model = transformers.MixtralForSequenceClassification(language.config)
        model.model.load_state_dict(language.model.state_dict())
        return RewardTrainer(model, RewardConfig(**settings), train_dataset=data)

    model = tiny_model("Mixtral", **EXPERTS).model
    rows = [[3, 4, 5, 6, 7], [3, 4, 5, 8, 9]][: 1 if kind == "sft" else 2]
    # Of packed rows: the backbone sees each sequence alone, the loss all their tokens.
    logits = [model(torch.tensor([ids]), output_router_logits=True).router_logits for ids in rows]
    layers = tuple(map(torch.cat, zip(*logits, strict=True)))
    if kind == "reward":
        # A shared prompt counts once.
        layers = tuple(torch.cat([layer[:5], layer[8:]]) for layer in layers)
    load_balancing_loss_func(layers, 4, 2).backward()
    expected = 0.5 * model.layers[0].mlp.gate.weight.grad
    got = router_gradient(make(0.5)) - router_gradient(make(0.0))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
