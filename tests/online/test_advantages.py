"""Generalised advantages against a naive double loop; whitening with and without padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdaa.online.advantages import gae, pad, unpad, whiten, whiten_with_padding

LENGTHS = torch.tensor([3, 1, 7, 2, 5])


def _ragged(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(LENGTHS.sum()), generator=generator, dtype=torch.float64)


def _naive(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """The definition: discounted sums of one-step errors, for every start anew."""
    advantages, start = [], 0
    for length in LENGTHS.tolist():
        r, v = rewards[start : start + length], values[start : start + length]
        following = torch.cat([v[1:], v.new_zeros(1)])
        delta = r + gamma * following - v
        for t in range(length):
            advantages.append(sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)))
        start += length
    return torch.stack(advantages)


@pytest.mark.parametrize(
    ("gamma", "lam"),
    [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.99, 1.0)],
    ids=["authors", "discounted", "one-step", "whole-returns"],
)
def test_gae_equals_the_double_loop(gamma: float, lam: float) -> None:
    rewards, values = _ragged(0), _ragged(1)
    advantages, returns = gae(rewards, values, LENGTHS, gamma=gamma, gae_lambda=lam)
    torch.testing.assert_close(advantages, _naive(rewards, values, gamma, lam))
    torch.testing.assert_close(returns, advantages + values)


def test_gae_by_hand() -> None:
    # delta = (0 + 0.5 - 1, 2 + 0 - 0.5) = (-0.5, 1.5); A_0 = -0.5 + 0.5 * 1.5
    advantages, returns = gae(
        torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.5]), torch.tensor([2]), gae_lambda=0.5
    )
    assert advantages.tolist() == [0.25, 1.5]
    assert returns.tolist() == [1.25, 2.0]


def test_whole_returns_without_critic_are_sums_of_rewards() -> None:
    rewards = _ragged(2)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), LENGTHS, gae_lambda=1.0)
    first = LENGTHS.cumsum(0) - LENGTHS
    torch.testing.assert_close(
        advantages[first], torch.segment_reduce(rewards, "sum", lengths=LENGTHS)
    )


def test_a_critic_gets_no_gradient() -> None:
    values = _ragged(1).requires_grad_()
    advantages, returns = gae(_ragged(0), values, LENGTHS)
    assert not advantages.requires_grad
    assert not (returns - values.detach()).requires_grad


def test_whitened_tokens_have_mean_0_and_variance_1() -> None:
    white = whiten(5 + 3 * _ragged(0))
    assert abs(float(white.mean())) < 1e-12
    assert float(white.square().mean()) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize(
    "advantages",
    [torch.tensor([4.0]), torch.full((3,), 2.0)],
    ids=["one-token", "equal-tokens"],
)
def test_nothing_to_whiten_is_zero(advantages: Tensor) -> None:
    assert whiten(advantages).tolist() == [0.0] * len(advantages)


def test_unmasked_whitening_is_that_of_the_padded_rectangle() -> None:
    advantages = 1 + _ragged(0)
    rectangle = torch.zeros(len(LENGTHS), int(LENGTHS.max()), dtype=torch.float64)
    for row, part in zip(rectangle, advantages.split(LENGTHS.tolist()), strict=True):
        row[: len(part)] = part
    white = (rectangle - rectangle.mean()) * torch.rsqrt(rectangle.var() + 1e-8)
    mask = torch.arange(rectangle.shape[1])[None] < LENGTHS[:, None]
    found = whiten_with_padding(advantages, LENGTHS)
    torch.testing.assert_close(found, white[mask])
    # What is wrong with it: tokens do not come out centred.
    assert abs(float(found.mean())) > 0.1


def test_padding_there_and_back() -> None:
    values = _ragged(3)
    padded = pad(values, LENGTHS)
    assert padded.shape == (5, 7)
    assert torch.equal(padded[1], torch.cat([values[3:4], torch.zeros(6)]))
    assert torch.equal(unpad(padded, LENGTHS), values)
