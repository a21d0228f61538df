"""The optimiser step against one written out with padding, logits and plain Adam."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def _written_out(
    policy: nn.Module, critic: Critic, experience: Experience, config: OnlineConfig
) -> dict[str, Tensor]:
    """One step of clipped Adam on materialised log-probs of single sequences."""
    lengths = experience.lengths.tolist()
    parts = [torch.split(values, lengths) for values in experience[1:]]
    logps, values = [], []
    for index in BATCH.sequences.tolist():
        prompt = experience.rollouts.prompt_ids[index]
        completion = experience.rollouts.completion_ids[index]
        ids = torch.cat([prompt, completion])[None]
        rows = slice(len(prompt) - 1, -1)
        hidden = policy.model(input_ids=ids).last_hidden_state[0, rows]
        logits = policy.lm_head(hidden) / config.temperature
        logps.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
        if not critic.shared:
            hidden = critic.backbone(input_ids=ids).last_hidden_state[0, rows]
        values.append(critic.head(hidden))
    old, ref, old_values, adv, ret = (
        torch.cat([part[i] for i in BATCH.sequences.tolist()]) for part in parts
    )
    logp, value = torch.cat(logps), torch.cat(values)
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
    prepare_model(policy, "packed")
    config = dataclasses.replace(CONFIG, algorithm="ppo", whiten_advantages="none")
    updater = Updater(policy, Critic(policy), config)
    first = updater.step(experience, BATCH)
    assert set(first) == {
        "loss/policy", "loss/value", "policy/approxkl", "policy/clipfrac", "val/ratio",
        "grad_norm/policy", "grad_norm/value",
    }  # fmt: skip
    assert 0 < float(first["policy/clipfrac"]) < 1
    assert float(first["policy/approxkl"]) > 0


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
