"""APA and AWR on tokens, and their offline form on pairs."""

from __future__ import annotations

import math

import pytest
import torch

from fastdaa.losses import Objective, apa, apa_pairs, awr, awr_pairs, sft
from fastdaa.outputs import PairLogps

LENGTHS = torch.tensor([2, 1, 0, 0, 3, 0])  # three pairs; the second scores nothing


def tokens(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    logps, ref, advantages = -4 * torch.rand(3, 6, generator=generator, dtype=torch.float64)
    return logps.to(dtype).requires_grad_(), ref.to(dtype), (advantages + 2).to(dtype)


def test_apa_value_and_gradient():
    logps, ref, advantages = tokens()
    losses = apa(logps, ref, advantages, lam=0.5)
    error = [
        p - a / 0.5 - r
        for p, a, r in zip(logps.tolist(), advantages.tolist(), ref.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx([e**2 for e in error], rel=1e-13)
    (grad,) = torch.autograd.grad(losses.mean(), logps)
    assert grad.tolist() == pytest.approx([2 * e / 6 for e in error], rel=1e-13)


def test_awr_value_gradient_and_cap():
    logps, _, advantages = tokens()
    advantages[0] = 100.0
    losses = awr(logps, advantages, lam=0.5, max_weight=20.0)
    weights = [min(20.0, math.exp(a / 0.5)) for a in advantages.tolist()]
    assert losses.tolist() == pytest.approx(
        [-w * p for w, p in zip(weights, logps.tolist(), strict=True)], rel=1e-13
    )
    (grad,) = torch.autograd.grad(losses.mean(), logps)
    assert grad.tolist() == pytest.approx([-w / 6 for w in weights], rel=1e-13)
    assert weights[0] == 20.0


@pytest.mark.parametrize("fn", [apa, awr], ids=["apa", "awr"])
def test_no_gradient_reaches_the_advantages(fn):
    logps, ref, advantages = tokens()
    advantages.requires_grad_()
    inputs = (logps, ref, advantages) if fn is apa else (logps, advantages)
    fn(*inputs).sum().backward()
    assert advantages.grad is None
    assert logps.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_advantages_of_half_precision_are_rounded_once(dtype):
    logps, ref, advantages = tokens(torch.float32)
    half = advantages.to(dtype)
    assert torch.equal(apa(logps, ref, half, lam=0.3), apa(logps, ref, half.float(), lam=0.3))
    assert torch.equal(awr(logps, half, lam=0.3), awr(logps, half.float(), lam=0.3))


def test_gradcheck_in_fp64():
    logps, ref, advantages = tokens()
    assert torch.autograd.gradcheck(lambda x: apa(x, ref, advantages), (logps,))
    assert torch.autograd.gradcheck(lambda x: awr(x, advantages), (logps,))
    for name in ("apa", "awr"):
        objective = Objective.parse(name, lam=0.7)
        assert torch.autograd.gradcheck(
            lambda x, o=objective: o.token_losses(x, ref, LENGTHS), (logps,)
        )


def test_fp32_agrees_with_fp64():
    narrow = [apa(*tokens(torch.float32)), awr(tokens(torch.float32)[0], tokens(torch.float32)[2])]
    wide = [apa(*tokens()), awr(tokens()[0], tokens()[2])]
    for got, want in zip(narrow, wide, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


def test_apa_on_policy_bandit_stops_at_the_normalised_tilt():
    """With weights equal to the policy, the stationary point is ref * exp(reward / lam) / Z."""
    ref = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    reward, lam = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64), 2.0
    optimum = torch.log_softmax(ref + reward / lam, dim=0)
    logits = optimum.clone().requires_grad_()
    logps = torch.log_softmax(logits, dim=0)
    advantages = reward - (optimum.exp() * reward).sum()
    (logps.detach().exp() * apa(logps, ref, advantages, lam=lam)).sum().backward()
    assert logits.grad.abs().max() < 1e-15
    residual = apa(optimum, ref, advantages, lam=lam)
    assert residual.std() < 1e-14  # (log Z)^2 in every arm: the loss does not go to 0
    assert residual.mean() > 1e-3


def test_pairs_give_plus_and_minus_one_to_the_tokens_of_each_side():
    logps, ref, _ = tokens()
    signs = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert torch.equal(apa_pairs(logps, ref, LENGTHS, lam=0.5), apa(logps, ref, signs, lam=0.5))
    assert torch.equal(awr_pairs(logps, None, LENGTHS), awr(logps, signs))


def test_pairs_take_one_advantage_a_sequence():
    logps, ref, _ = tokens()
    advantages = torch.tensor([0.5, -2.0, 9.0, 9.0, 3.0, 9.0], dtype=torch.float64)
    spread = torch.tensor([0.5, 0.5, -2.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    assert torch.equal(
        apa_pairs(logps, ref, LENGTHS, advantages=advantages), apa(logps, ref, spread, lam=1.0)
    )
    with pytest.raises(ValueError, match=r"expected one advantage a sequence, \(6,\), got \(5,\)"):
        apa_pairs(logps, ref, LENGTHS, advantages=advantages[:5])


def test_objective_gives_pair_sums_whose_mean_is_the_token_mean():
    logps, ref, _ = tokens()
    losses = Objective.parse("apa", lam=0.5).token_losses(logps, ref, LENGTHS)
    per_token = apa_pairs(logps, ref, LENGTHS, lam=0.5)
    assert losses.tolist() == pytest.approx(
        [per_token[:3].sum().item() / 2, 0.0, per_token[3:].sum().item() / 2], rel=1e-13
    )
    torch.testing.assert_close(losses.mean(), per_token.mean(), rtol=1e-13, atol=0)


def test_chunks_of_pairs_add_up_to_the_batch():
    logps, ref, _ = tokens()
    objective = Objective.parse(["apa", "awr"], weights=[0.5, 2.0])
    whole = objective.token_losses(logps, ref, LENGTHS)
    parts = [
        objective.token_losses(logps[t], ref[t], LENGTHS[s], pairs=3, tokens=6)
        for t, s in ((slice(0, 3), slice(0, 4)), (slice(3, 6), slice(4, 6)))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-14, atol=0)
    expected = 0.5 * apa_pairs(logps, ref, LENGTHS) + 2.0 * awr_pairs(logps, None, LENGTHS)
    torch.testing.assert_close(whole.mean(), expected.mean(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_batch_without_a_scored_token_gives_zeros(dtype):
    empty = torch.zeros(0, dtype=dtype, requires_grad=True)
    losses = Objective.parse("apa").token_losses(empty, empty, torch.zeros(4, dtype=torch.int64))
    assert losses.tolist() == [0.0, 0.0]
    losses.sum().backward()


def test_mixture_of_token_and_pair_terms():
    logps, ref, _ = tokens()
    objective = Objective.parse(["apa", "sft"], weights=[1.0, 0.5])
    assert objective.has_token_level
    assert objective.needs_ref
    policy = PairLogps(torch.stack([logps[:2].sum(), logps[:0].sum(), logps[3:].sum()]),
                       torch.stack([logps[2], logps[:0].sum(), logps[:0].sum()]),
                       LENGTHS[::2], LENGTHS[1::2])  # fmt: skip
    token_part = objective.token_losses(logps, ref, LENGTHS)
    losses = objective(policy, None, token_losses=token_part)
    torch.testing.assert_close(losses, token_part + 0.5 * sft(policy, None))
    with pytest.raises(ValueError, match="expected token_losses for the objective apa_pairs"):
        objective(policy, None)
    with pytest.raises(ValueError, match="expected no token_losses for the objective dpo"):
        Objective.parse("dpo")(policy, policy, token_losses=token_part)


def test_token_losses_say_what_is_missing():
    logps, ref, _ = tokens()
    with pytest.raises(ValueError, match="expected reference log-probabilities for apa_pairs"):
        Objective.parse("apa").token_losses(logps, None, LENGTHS)
    with pytest.raises(ValueError, match="expected an objective with token-level losses, got dpo"):
        Objective.parse("dpo").token_losses(logps, ref, LENGTHS)
    with pytest.raises(ValueError, match="expected pairs and tokens together, got pairs=3"):
        Objective.parse("apa").token_losses(logps, ref, LENGTHS, pairs=3)
