"""The optimiser step against one written out with padding, logits and plain Adam."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from fastdaa.online.config import OnlineConfig
from fastdaa.online.critic import Critic
from fastdaa.online.types import Experience, Rollouts
from fastdaa.online.update import Minibatch, Updater, minibatches
from fastdaa.train.prepare import prepare_model

CONFIG = OnlineConfig(
    output_dir=None, rollouts_per_iteration=6, minibatch=4, learning_rate=1e-2, kl_lambda=0.5,
    max_grad_norm=0.5, clip_range_value=0.3, critic_learning_rate=3e-2, temperature=0.9,
)  # fmt: skip
BATCH = Minibatch(0, torch.tensor([4, 0, 3]))


@pytest.fixture
def experience(sequences: Callable[..., Any]) -> Experience:
    prompts, completions = sequences(6)
    generator = torch.Generator().manual_seed(1)
    tokens = sum(map(len, completions))
    old, ref, values, advantages = torch.randn(4, tokens, generator=generator)
    scores = torch.randn(6, generator=generator)
    rollouts = Rollouts(prompts, completions, torch.ones(6, dtype=torch.bool), scores, scores)
    # Near the model's own log-probs, so that some ratios are clipped and some are not.
    return Experience(
        rollouts, 0.3 * old - 3.4, 0.3 * ref - 3.4, 0.2 * values, advantages, advantages + values
    )


def _of_batch(experience: Experience) -> list[Tensor]:
    """Old and reference log-probs, values, advantages and returns of the batch's tokens."""
    parts = [values.split(experience.lengths.tolist()) for values in experience[1:]]
    return [torch.cat([part[i] for i in BATCH.sequences.tolist()]) for part in parts]


def _logps_and_values(
    policy: nn.Module, critic: Critic, experience: Experience, temperature: float
) -> tuple[Tensor, Tensor]:
    """Of the batch's tokens, from materialised logits of single sequences."""
    logps, values = [], []
    for index in BATCH.sequences.tolist():
        prompt = experience.rollouts.prompt_ids[index]
        completion = experience.rollouts.completion_ids[index]
        ids = torch.cat([prompt, completion])[None]
        rows = slice(len(prompt) - 1, -1)
        hidden = policy.model(input_ids=ids).last_hidden_state[0, rows]
        logits = policy.lm_head(hidden) / temperature
        logps.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
        if not critic.shared:
            hidden = critic.backbone(input_ids=ids).last_hidden_state[0, rows]
        values.append(critic.head(hidden))
    return torch.cat(logps), torch.cat(values)


def _written_out(
    policy: nn.Module, critic: Critic, experience: Experience, config: OnlineConfig
) -> dict[str, Tensor]:
    """One step of clipped Adam."""
    old, ref, old_values, adv, ret = _of_batch(experience)
    logp, value = _logps_and_values(policy, critic, experience, config.temperature)
    if config.algorithm == "ppo":
        adv = (adv - adv.mean()) / (adv.var(correction=0) + 1e-8).sqrt()
        ratio = (logp - old).exp()
        losses = torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    elif config.algorithm == "awr":
        losses = -(adv / config.kl_lambda).exp().clamp(max=20) * logp
    else:
        losses = (logp - adv / config.kl_lambda - ref).square()
    near = old_values + (value - old_values).clamp(-0.3, 0.3)
    errors = 0.5 * torch.max((value - ret).square(), (near - ret).square())
    (losses.mean() + errors.mean()).backward()
    found = {"loss/policy": losses.mean().detach(), "loss/value": errors.mean().detach()}
    for name, model, rate in (("policy", policy, 1e-2), ("value", critic, 3e-2)):
        found[f"grad_norm/{name}"] = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.95)).step()
    return found


@pytest.mark.parametrize(
    ("algorithm", "budget", "critic"),
    [
        ("apa", None, "separate"),
        ("apa", 20, "separate"),
        ("ppo", 20, "separate"),
        ("awr", None, "separate"),
        ("apa", None, "shared"),
    ],
    ids=["apa", "apa-in-packs", "ppo-in-packs", "awr", "apa-shared"],
)
def test_a_step_equals_the_one_written_out(
    tiny_policy: Any, experience: Experience, algorithm: str, budget: int | None, critic: str
) -> None:
    config = dataclasses.replace(
        CONFIG, algorithm=algorithm, tokens_per_pack=budget, critic=critic,  # type: ignore[arg-type]
    )  # fmt: skip
    policy = tiny_policy()
    mine = Critic(policy, shared=critic == "shared", seed=5)
    naive_policy, naive_critic = copy.deepcopy(policy), copy.deepcopy(mine)
    if naive_critic.backbone is not None:
        naive_critic.backbone.set_attn_implementation("sdpa")
    prepare_model(policy, "packed")
    found = Updater(policy, mine, config).step(experience, BATCH)
    wanted = _written_out(naive_policy, naive_critic, experience, config)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for ours, theirs in ((policy, naive_policy), (mine, naive_critic)):
        for (name, new), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            # Adam's first step is the sign of the gradient where it is not next to nothing.
            torch.testing.assert_close(new, other, rtol=1e-3, atol=3e-4, msg=name)


def test_statistics_by_hand(tiny_policy: Any, experience: Experience) -> None:
    policy = tiny_policy()
    config = dataclasses.replace(
        CONFIG, algorithm="ppo", whiten_advantages="none", tokens_per_pack=20
    )
    critic = Critic(policy)
    logps, _ = _logps_and_values(copy.deepcopy(policy), critic, experience, config.temperature)
    old, _, _, advantages, _ = _of_batch(experience)
    change = logps.detach() - old
    ratio = change.exp()
    clipped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    assert clipped.any() and not clipped.all()
    prepare_model(policy, "packed")
    found = Updater(policy, critic, config).step(experience, BATCH)
    assert set(found) == {
        "loss/policy", "loss/value", "policy/approxkl", "policy/clipfrac", "val/ratio",
        "grad_norm/policy", "grad_norm/value",
    }  # fmt: skip
    for name, wanted in (
        ("policy/approxkl", 0.5 * change.square().mean()),
        ("val/ratio", ratio.mean()),
        ("policy/clipfrac", clipped.float().mean()),
    ):
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_every_pass_takes_every_sequence_once() -> None:
    plan = minibatches(CONFIG, iteration=3, sequences=6)
    assert [(batch.epoch, len(batch.sequences)) for batch in plan] == [
        (0, 4), (0, 2), (1, 4), (1, 2)
    ]  # fmt: skip
    orders = [torch.cat([b.sequences for b in plan if b.epoch == epoch]) for epoch in (0, 1)]
    assert all(order.sort().values.tolist() == list(range(6)) for order in orders)
    again = minibatches(CONFIG, iteration=3, sequences=6)
    assert all(torch.equal(a.sequences, b.sequences) for a, b in zip(plan, again, strict=True))
    other = torch.cat([b.sequences for b in minibatches(CONFIG, iteration=4, sequences=6)])
    assert not torch.equal(torch.cat(orders), other)


def test_a_policy_without_trainable_parameters(tiny_policy: Any) -> None:
    policy = tiny_policy().requires_grad_(False)
    with pytest.raises(ValueError, match="policy: expected trainable parameters"):
        Updater(policy, Critic(policy), CONFIG)


def test_a_mixture_of_experts_is_kept_balanced(
    experience: Experience,
) -> None:
    """Each pack adds its load-balancing loss, in proportion to its tokens."""
    torch.manual_seed(0)
    policy = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=29, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
            num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5,
        )
    ).eval()  # fmt: skip
    router = policy.model.layers[0].mlp.gate.weight
    expected = torch.zeros_like(router)
    lengths = experience.lengths[BATCH.sequences]
    for sequence, length in zip(BATCH.sequences.tolist(), lengths.tolist(), strict=True):
        parts = (experience.rollouts.prompt_ids, experience.rollouts.completion_ids)
        ids = torch.cat([part[sequence] for part in parts])[None]
        (gradient,) = torch.autograd.grad(policy(input_ids=ids).aux_loss, router)
        expected += 0.5 * gradient * length / lengths.sum()

    def gradient_of_router(coefficient: float) -> Tensor:
        model = copy.deepcopy(policy)
        model.config.router_aux_loss_coef = coefficient
        prepare_model(model, "packed")
        # A pack a sequence.
        config = dataclasses.replace(CONFIG, tokens_per_pack=1, max_grad_norm=0.0)
        updater = Updater(model, Critic(model), config)
        found: list[Tensor] = []
        weight = model.model.layers[0].mlp.gate.weight
        updater.optimizer.register_step_pre_hook(lambda *_: found.append(weight.grad.clone()))
        updater.step(experience, BATCH)
        return found[0]

    found = gradient_of_router(0.5) - gradient_of_router(0.0)
    assert float(expected.abs().max()) > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
