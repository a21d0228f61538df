"""What a step of the trainer computes: the mean over pairs, however the batch is laid out."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastdaa import custom_loss

LN2 = float(np.float32(np.log(2)))
LAYOUTS = ("padded", "packed", "prefix_shared")
BETA = 0.3


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(got, expected, atol=1e-6, rtol=1e-5):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(
            got[name], expected[name], atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


STARTS = {
    **{layout: {"layout": layout} for layout in LAYOUTS},
    "packs": {"tokens_per_pack": 20},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("options", STARTS.values(), ids=STARTS)
def test_the_first_loss_is_ln_2_to_the_bit(make_trainer, options):
    trainer = make_trainer(**options)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["loss"] == LN2
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/accuracies"):
        assert row[name] == 0.0, name
    assert row["kl/token"] == row["kl/k1"] == row["displacement/fraction"] == 0.0


@pytest.mark.parametrize("tokens_per_pack", [None, 25, 1], ids=["one", "some", "a pack a pair"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_mean_over_pairs(
    one_step, tiny_model, shifted, naive, pairs, layout, tokens_per_pack
):
    data, model = pairs(4), tiny_model()
    with torch.no_grad():
        ref_chosen, ref_rejected = naive(shifted).logps(data)
    chosen, rejected = naive(model).logps(data)
    loss = -F.logsigmoid(BETA * (chosen - ref_chosen - rejected + ref_rejected)).mean()
    got, trainer = one_step(
        data=data, ref_model=copy.deepcopy(shifted), beta=BETA, layout=layout,
        tokens_per_pack=tokens_per_pack,
    )  # fmt: skip
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert_same(got, gradients_of(model, loss))
    packs = next(iter(trainer.get_train_dataloader()))["packs"]
    assert len(packs) > 1 or tokens_per_pack is None


OBJECTIVES = {
    "ipo_norm": {"loss_type": ["ipo_norm"]},
    "slic": {"loss_type": ["slic"]},
    "dpo+sft": {"loss_type": ["dpo", "sft"], "loss_weights": [1.0, 0.5]},
    "smoothed": {"loss_type": ["dpo"], "label_smoothing": 0.1},
    "apa": {"loss_type": ["apa_pairs"]},
    "simpo": {"loss_type": ["simpo"]},
    "orpo": {"loss_type": ["orpo"]},
    "sft": {"loss_type": ["sft"]},
}


def naive_loss(name, model, ref, naive, data):
    """The losses again, each from its formula and the logits of single sequences."""
    policy, reference = naive(model), naive(ref)
    chosen, rejected = policy.logps(data)
    with torch.no_grad():
        ref_chosen, ref_rejected = reference.logps(data)
    n_chosen, n_rejected = (
        torch.tensor([len(ids) for ids in data[f]]) for f in ("chosen_ids", "rejected_ids")
    )
    sft = -chosen.sum() / n_chosen.sum()
    a, b = chosen - ref_chosen, rejected - ref_rejected
    if name == "ipo_norm":
        return (a / n_chosen - b / n_rejected - 1 / (2 * 0.1)).square().mean()
    if name == "slic":
        return F.relu(1 - 0.1 * (a - b)).mean()
    if name == "dpo+sft":
        return -F.logsigmoid(0.1 * (a - b)).mean() + 0.5 * sft
    if name == "smoothed":
        x = 0.1 * (a - b)
        return (-0.9 * F.logsigmoid(x) - 0.1 * F.logsigmoid(-x)).mean()
    if name == "apa":
        tokens = []
        for row in data:
            for field, advantage in (("chosen_ids", 1.0), ("rejected_ids", -1.0)):
                with torch.no_grad():
                    before = reference.token_logps(row, field)
                tokens.append((policy.token_logps(row, field) - before - advantage).square())
        return torch.cat(tokens).mean()
    if name == "simpo":
        return -F.logsigmoid(2.0 * (chosen / n_chosen - rejected / n_rejected) - 1.0).mean()
    if name == "orpo":
        means = [chosen / n_chosen, rejected / n_rejected]
        odds = [mean - torch.log1p(-mean.exp()) for mean in means]
        return sft - 0.1 * F.logsigmoid(odds[0] - odds[1]).mean()
    return sft


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_kind_of_objective_over_several_packs(
    one_step, tiny_model, shifted, naive, pairs, name
):
    data, model, options = pairs(4), tiny_model(), OBJECTIVES[name]
    loss = naive_loss(name, model, shifted, naive, data)
    uses_ref = name not in ("simpo", "orpo", "sft")
    ref = {"ref_model": copy.deepcopy(shifted)} if uses_ref else {}
    got, trainer = one_step(data=data, tokens_per_pack=15, **ref, **options)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=2e-6)
    scale = max(1.0, loss.item())
    assert_same(got, gradients_of(model, loss), atol=2e-6 * scale)
    assert (trainer.reference is not None) == uses_ref


def test_without_a_reference_none_is_kept_or_logged(make_trainer):
    trainer = make_trainer(loss_type=["simpo"])
    trainer.train()
    row = trainer.state.log_history[0]
    assert trainer.reference is None
    assert not {"kl/token", "kl/k1", "displacement/chosen"} & row.keys()
    assert row["rewards/chosen"] == pytest.approx(2.0 * row["logps/chosen"])


def test_a_reference_that_was_given_is_used_for_metrics_only(make_trainer, shifted):
    trainer = make_trainer(loss_type=["sft"], ref_model=copy.deepcopy(shifted))
    trainer.train()
    assert trainer.state.log_history[0]["kl/token"] > 0


def test_accumulated_batches_are_one_batch(one_step, pairs):
    data = pairs(8)
    whole, _ = one_step(data=data, per_device_train_batch_size=8)
    for options in ({}, {"tokens_per_pack": 20}):
        parts, _ = one_step(data=data, gradient_accumulation_steps=2, **options)
        assert_same(parts, whole)


def test_packs_change_the_updates_only_by_rounding(make_trainer, pairs, losses_of):
    data = pairs(16)
    one = make_trainer(data=data, max_steps=4)
    some = make_trainer(data=data, max_steps=4, tokens_per_pack=25)
    one.train()
    some.train()
    assert losses_of(some) == pytest.approx(losses_of(one), abs=1e-5)
    assert one.state.log_history[2]["num_tokens"] == some.state.log_history[2]["num_tokens"]


def test_losses_that_couple_a_batch_cannot_be_split(make_trainer):
    with pytest.raises(ValueError, match="tokens_per_pack: expected None"):
        make_trainer(loss_type=["kto"], tokens_per_pack=100)
    trainer = make_trainer(loss_type=["kto"])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0.5


def test_a_loss_of_the_callers_trains_and_is_saved(make_trainer, losses_of, tmp_path):
    beta = 0.1

    def own_dpo(policy, ref):  # of no module, so that it cannot be pickled
        return -F.logsigmoid(beta * (policy.chosen - ref.chosen - policy.rejected + ref.rejected))

    options = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    expected = make_trainer(beta=beta, max_steps=2, learning_rate=1e-2)
    expected.train()
    trainer = make_trainer(loss_type=custom_loss(own_dpo, coupled=False), **options)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses_of(expected), abs=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert saved.loss_type == ["own_dpo"]
    # What trackers are told.
    assert json.loads(trainer.args.to_json_string())["loss_type"] == ["own_dpo"]
    assert trainer.args.objective().needs_ref


MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}


@pytest.mark.parametrize("tokens_per_pack", [None, 1], ids=["one pack", "a pack a pair"])
def test_mixture_of_experts_is_balanced(one_step, tiny_model, naive, pairs, tokens_per_pack):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    data = pairs(4)
    model = tiny_model("Mixtral", **MIXTRAL, router_aux_loss_coef=0.5)
    model.train()
    balance = []
    groups = [[row] for row in data] if tokens_per_pack else [list(data)]
    for group in groups:
        sequences = [
            row["prompt_ids"] + row[f] for row in group for f in ("chosen_ids", "rejected_ids")
        ]
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
        outputs = model.model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        balance.append(load_balancing_loss_func(outputs.router_logits, 4, 2, mask))
    aux_loss = torch.stack(balance).mean()
    chosen, rejected = naive(model).logps(data)
    h = chosen - chosen.detach() - rejected + rejected.detach()
    loss = -F.logsigmoid(0.1 * h).mean() + 0.5 * aux_loss
    got, trainer = one_step(
        model=copy.deepcopy(model), data=data, layout="padded", tokens_per_pack=tokens_per_pack
    )
    row = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["aux_loss"] == pytest.approx(aux_loss.item(), rel=1e-6)
    assert_same(got, gradients_of(model, loss))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activation_checkpointing_changes_no_gradient(one_step, layout):
    plain, _ = one_step(layout=layout, loss_type=["dpo", "sft"])
    recomputed, trainer = one_step(
        layout=layout, loss_type=["dpo", "sft"], gradient_checkpointing=True
    )
    assert trainer.model.model.gradient_checkpointing
    assert_same(recomputed, plain, atol=1e-7)


def test_bf16_autocast_trains(make_trainer, losses_of):
    trainer = make_trainer(bf16=True, max_steps=6, num_train_epochs=3, learning_rate=3e-3)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == LN2
    assert losses[-1] < 0.9 * LN2
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_optimizers_with_modes_are_switched_for_every_pack(make_trainer, tiny_model):
    model, modes = tiny_model(), []

    class Scheduled(torch.optim.SGD):
        def train(self):
            modes.append("train")

        def eval(self):
            modes.append("eval")

    optimizer = Scheduled(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = make_trainer(model=model, optimizers=(optimizer, scheduler), tokens_per_pack=1)
    trainer.train()
    assert modes and set(modes) == {"train"}


def test_pairs_can_be_grouped_by_length(make_trainer, pairs):
    data = pairs(40)
    options = {"data": data, "eval_dataset": data}
    trainer = make_trainer(train_sampling_strategy="group_by_length", **options)
    plain = make_trainer(**options)
    total = np.array([sum(len(row[f]) for f in row) for row in data])

    def spread(loader):
        return np.mean([np.ptp(total[batch["row_ids"]]) for batch in loader])

    for name in ("get_train_dataloader", "get_eval_dataloader"):
        assert spread(getattr(trainer, name)()) < 0.6 * spread(getattr(plain, name)())


def test_packs_repeated_for_other_ranks_do_not_count_in_an_evaluation(
    make_trainer, pairs, monkeypatch
):
    trainer = make_trainer(eval_dataset=pairs(5, seed=3), tokens_per_pack=40)
    trainer.train()
    names = ("eval_loss", "eval_entropy", "eval_rewards/margins", "eval_kl/token")
    before = trainer.evaluate()
    monkeypatch.setattr(trainer, "_evened", lambda packs: [*packs, packs[0]])
    after = trainer.evaluate()
    assert [after[name] for name in names] == pytest.approx([before[name] for name in names])


def test_a_trainer_shows_what_it_trains(make_trainer, pairs):
    trainer = make_trainer(data=pairs(4), beta=0.25, layout="padded")
    shown = repr(trainer)
    assert shown.startswith("PreferenceTrainer(LlamaForCausalLM, dpo(beta=0.25, ")
    assert shown.endswith(", 4 pairs, padded layout, step 0)")


def test_the_card_of_a_push_names_the_data(make_trainer):
    trainer = make_trainer()
    trainer.card_dataset = ["someone/pairs"]
    trainer.create_model_card(model_name="what push_to_hub says")
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "preference pairs of `someone/pairs`" in card.replace("[", "`").replace("]", "`")
