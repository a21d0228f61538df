"""Losses and gradients of tokens against closed forms, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdaa.online.config import OnlineConfig
from fastdaa.online.objectives import TokenData, is_clipped, policy_losses, ppo, value_loss

N, LAM = 64, 0.3


def _data(seed: int = 0) -> tuple[Tensor, TokenData]:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(N, generator=generator, dtype=torch.float64)

    logps = (normal(1.0) - 2).requires_grad_()
    return logps, TokenData(logps.detach() + normal(0.3), normal(1.0) - 2, normal(1.0))


def _gradient(config: OnlineConfig, logps: Tensor, data: TokenData) -> tuple[Tensor, Tensor]:
    losses = policy_losses(config, logps, data)
    (gradient,) = torch.autograd.grad(losses.mean(), logps)
    return losses.detach(), gradient


def test_apa() -> None:
    logps, data = _data()
    losses, gradient = _gradient(OnlineConfig(algorithm="apa", kl_lambda=LAM), logps, data)
    error = logps.detach() - data.advantages / LAM - data.ref_logps
    torch.testing.assert_close(losses, error.square(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gradient, 2 * error / N, rtol=1e-14, atol=1e-15)


def test_awr_with_clamped_weights() -> None:
    logps, data = _data()
    config = OnlineConfig(algorithm="awr", kl_lambda=LAM, max_advantage_weight=5.0)
    losses, gradient = _gradient(config, logps, data)
    weights = (data.advantages / LAM).exp().clamp(max=5.0)
    assert (weights == 5.0).any()
    torch.testing.assert_close(losses, -weights * logps.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, -weights / N, rtol=1e-13, atol=1e-15)


def test_ppo() -> None:
    logps, data = _data()
    losses, gradient = _gradient(OnlineConfig(algorithm="ppo", clip_range=0.2), logps, data)
    ratio = (logps.detach() - data.old_logps).exp()
    a = data.advantages
    clipped = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    assert clipped.any()
    assert not clipped.all()
    expected = torch.where(clipped, -a * ratio.clamp(0.8, 1.2), -a * ratio)
    torch.testing.assert_close(losses, expected, rtol=1e-14, atol=1e-14)
    slope = torch.where(clipped, 0.0, -a * ratio / N)
    torch.testing.assert_close(gradient, slope, rtol=1e-13, atol=1e-15)
    assert torch.equal(is_clipped(logps, data.old_logps, a, 0.2), clipped)


def test_ppo_at_enormous_ratios_has_a_finite_gradient() -> None:
    logps = torch.zeros(2, requires_grad=True)
    losses = ppo(logps, torch.full((2,), -500.0), torch.tensor([1.0, -1.0]))
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert logps.grad is not None
    assert torch.isfinite(logps.grad).all()


def test_value_loss() -> None:
    values = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([2.0, 2.5], dtype=torch.float64)
    losses = value_loss(values, returns, torch.zeros(2))
    assert losses.tolist() == [0.5, 0.125]
    losses.mean().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [-0.5, 0.25]  # (V - R) / N


def test_clipped_value_loss_takes_the_worse() -> None:
    values = torch.tensor([3.0, 3.0, 0.1], requires_grad=True)
    old = torch.tensor([1.0, 1.0, 0.0])
    returns = torch.tensor([3.0, 0.0, 1.0])
    # Kept within 0.2 of the old values: 1.2, 1.2, 0.1.
    losses = value_loss(values, returns, old, clip_range=0.2)
    assert losses.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 9.0, 0.5 * 0.81])
    losses.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.0, 3.0, -0.9])


def test_loss_floor_of_apa_on_a_bandit() -> None:
    """At pi_init e^(r / lam) / Z the loss of every action is (log Z)^2, not 0."""
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    rewards = torch.tensor([0.0, 0.3, -0.6], dtype=torch.float64)
    log_z = torch.logsumexp(ref + rewards / LAM, 0)
    best = (ref + rewards / LAM - log_z).requires_grad_()
    config = OnlineConfig(algorithm="apa", kl_lambda=LAM)
    losses = policy_losses(config, best, TokenData(best.detach(), ref, rewards))
    torch.testing.assert_close(losses, log_z.square().expand(3), rtol=1e-13, atol=0)
    # Weighted by the policy itself there is no gradient left on the simplex.
    (gradient,) = torch.autograd.grad((best.detach().exp() * losses).sum(), best)
    per_logit = gradient - best.detach().exp() * gradient.sum()
    assert float(per_logit.abs().max()) < 1e-15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "dpo"}, "algorithm: expected"),
        ({"kl_lambda": 0.0}, "kl_lambda: expected a number above 0"),
        ({"minibatch": 256}, "minibatch: expected at most rollouts_per_iteration"),
        ({"gae_lambda": 1.5}, "gae_lambda: expected 0 to 1"),
        ({"clip_range_value": -0.2}, "clip_range_value: expected a number above 0"),
        ({"epochs": 0}, "epochs: expected an integer above 0"),
        ({"kl_coef": -0.1}, "kl_coef: expected 0 or more"),
        ({"kl_coef": 0.0, "kl_controller": "adaptive"}, "kl_coef: expected a number above 0 to"),
        ({"kl_lambda": math.inf}, "kl_lambda: expected a number above 0"),
        ({"learning_rate": math.nan}, "learning_rate: expected a number above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("algorithm", "asked", "whitening"),
    [("apa", "auto", "none"), ("ppo", "auto", "masked"), ("awr", "auto", "none"),
     ("apa", "unmasked", "unmasked"), ("ppo", "none", "none")],
)  # fmt: skip
def test_whitening_by_algorithm(algorithm: str, asked: str, whitening: str) -> None:
    config = OnlineConfig(algorithm=algorithm, whiten_advantages=asked)  # type: ignore[arg-type]
    assert config.whitening == whitening


def test_the_command_line_reads_every_field() -> None:
    from transformers import HfArgumentParser

    (config,) = HfArgumentParser(OnlineConfig).parse_args_into_dataclasses(
        ["--algorithm", "ppo", "--ppo_epochs", "4", "--clip_range_value", "0.2", "--bf16"]
    )
    assert (config.algorithm, config.epochs, config.clip_range_value) == ("ppo", 4, 0.2)
    assert config.bf16
