"""Packed sequences give the numbers of one sequence at a time, on every path through the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdaa.head import LmHead
from fastdaa.losses import apa
from fastdaa.online.critic import Critic, ValueHead
from fastdaa.online.packs import make_packs, token_index
from fastdaa.online.scoring import score_tokens, score_values
from fastdaa.online.token_loss import token_loss
from fastdaa.train.prepare import prepare_model

Sequences = Callable[..., tuple[list[Tensor], list[Tensor]]]


def _lengths(completions: list[Tensor]) -> Tensor:
    return torch.tensor([len(ids) for ids in completions])


def test_a_pack_by_hand() -> None:
    prompts = [torch.tensor([11, 12]), torch.tensor([13])]
    ((numbers, pack),) = make_packs(prompts, [torch.tensor([14]), torch.tensor([15, 16])])
    assert numbers.tolist() == [0, 1]
    assert pack["input_ids"].tolist() == [[11, 12, 14, 13, 15, 16]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert pack["rows"].tolist() == [1, 3, 4]
    assert pack["targets"].tolist() == [14, 15, 16]
    assert pack["counts"] == [1, 2]
    assert pack["segments"]["cu_q"].tolist() == [0, 3, 6]
    assert pack["tokens"] == 6


def test_packs_keep_the_budget_and_every_sequence(sequences: Sequences) -> None:
    prompts, completions = sequences(20)
    packs = make_packs(prompts, completions, tokens_per_pack=30)
    assert len(packs) > 1
    assert max(pack["tokens"] for _, pack in packs) <= 30
    assert sorted(torch.cat([numbers for numbers, _ in packs]).tolist()) == list(range(20))


def test_places_of_tokens() -> None:
    index = token_index(torch.tensor([2, 3, 1]), torch.tensor([2, 0]))
    assert index.tolist() == [5, 0, 1]


@pytest.mark.parametrize("budget", [None, 25], ids=["one-pack", "several-packs"])
@pytest.mark.parametrize("temperature", [1.0, 0.7], ids=["t1", "t0.7"])
def test_scores_equal_those_of_single_sequences(
    tiny_policy: Any, sequences: Sequences, budget: int | None, temperature: float
) -> None:
    model = tiny_policy()
    prompts, completions = sequences(7)
    expected: list[list[Tensor]] = [[], [], []]
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.cat([prompt, completion])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].double()
        logps = (logits / temperature).log_softmax(-1)
        expected[0].append(logps.gather(1, completion[:, None])[:, 0])
        expected[1].append(-(logps.exp() * logps).sum(-1))
        expected[2].append(logps.exp().amax(-1))
    prepare_model(model, "packed")
    packs = make_packs(prompts, completions, tokens_per_pack=budget)
    scores = score_tokens(model, packs, _lengths(completions), temperature=temperature)
    for found, wanted in zip(scores[:3], expected, strict=True):
        torch.testing.assert_close(found.double(), torch.cat(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_values_are_of_the_state_before_each_token(
    tiny_policy: Any, sequences: Sequences, kind: str
) -> None:
    policy = tiny_policy()
    prompts, completions = sequences(5)
    critic = Critic(policy, kind)
    torch.nn.init.normal_(critic.head.layers[-1].weight)
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.cat([prompt, completion])
        with torch.no_grad():
            hidden = policy.model(input_ids=ids[None]).last_hidden_state[0]
            expected.append(critic.head(hidden[len(prompt) - 1 : -1]))
    lengths = _lengths(completions)
    values = score_values(critic, make_packs(prompts, completions, tokens_per_pack=25), lengths)
    torch.testing.assert_close(values, torch.cat(expected), rtol=1e-4, atol=1e-5)
    # The copy has weights of its own; the policy's attention is untouched.
    assert policy.config._attn_implementation != critic.backbone.config._attn_implementation
    theirs = {id(parameter) for parameter in policy.parameters()}
    assert not any(id(parameter) in theirs for parameter in critic.parameters())


def test_a_shared_critic_reads_the_policy(tiny_policy: Any, sequences: Sequences) -> None:
    policy = tiny_policy()
    prompts, completions = sequences(5)
    separate, shared = Critic(policy, seed=3), Critic(policy, shared=True, seed=3)
    for critic in (separate, shared):
        torch.nn.init.ones_(critic.head.layers[-1].weight)
    prepare_model(policy, "packed")
    packs, lengths = make_packs(prompts, completions), _lengths(completions)
    values = score_tokens(policy, packs, lengths, critic=shared).values
    torch.testing.assert_close(values, score_values(separate, packs, lengths))
    with pytest.raises(RuntimeError, match="backbone of its own"):
        shared(packs[0][1])


def test_first_values_are_0() -> None:
    rows = torch.randn(4, 8)
    assert ValueHead(8)(rows).tolist() == [0.0] * 4
    assert ValueHead(8, "linear")(rows).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("impl", "max_bytes", "bias"),
    [("auto", None, False), ("auto", 4 * 29 * 3, True), ("recompute", None, True)],
    ids=["single-pass", "single-pass-in-chunks", "recompute"],
)
def test_token_loss_and_gradients_against_logits(
    impl: str, max_bytes: int | None, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    rows, weight, offset = normal(11, 8), normal(29, 8), normal(29) if bias else None
    targets = torch.randint(29, (11,), generator=generator)
    ref, advantages = normal(11).detach(), normal(11).detach()
    leaves = [t for t in (rows, weight, offset) if t is not None]

    head = LmHead(weight, offset, temperature=0.8)
    found = token_loss(
        rows, head, targets,
        lambda logps, part: apa(logps, ref[part], advantages[part], lam=0.5), 13,
        impl=impl, max_bytes=max_bytes,
    )  # fmt: skip
    logps = head.logits(rows).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    losses = apa(logps, ref, advantages, lam=0.5)
    torch.testing.assert_close(found.logps, logps.detach())
    torch.testing.assert_close(found.losses, losses.detach())
    torch.testing.assert_close(found.loss, losses.sum() / 13)
    for mine, theirs in zip(
        torch.autograd.grad(found.loss, leaves),
        torch.autograd.grad(losses.sum() / 13, leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_token_loss_of_a_frozen_head() -> None:
    rows = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    head = LmHead(torch.randn(29, 8, dtype=torch.float64))
    targets = torch.arange(5)
    found = token_loss(rows, head, targets, lambda logps, part: -logps, 5)
    logps = head.logits(rows).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (mine,), (theirs,) = (torch.autograd.grad(loss, rows) for loss in (found.loss, -logps.mean()))
    torch.testing.assert_close(mine, theirs)
