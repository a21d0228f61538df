"""Losses of tokens: APA, AWR and PPO for the policy, squared errors for the critic.

Every function maps ``[N]`` log-probs or values of the policy or critic in training to ``[N]``
losses; the objective is their mean over the tokens of a minibatch. Everything else is data without
gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastdaa.losses import apa, awr

if TYPE_CHECKING:
    from fastdaa.online.config import OnlineConfig

# Beyond e^20 a ratio is clipped, or so bad that its size does not matter; exp of it must be finite,
# because 0 times infinity is no gradient.
_LARGEST_LOG_RATIO = 20.0


class TokenData(NamedTuple):
    """What the loss of a token needs beside the policy's log-prob; each ``[N]``."""

    old_logps: Tensor
    ref_logps: Tensor
    advantages: Tensor
    """Whitened, where that is wanted."""

    def part(self, tokens: slice | Tensor) -> TokenData:
        """The data of some tokens."""
        return TokenData(*(values[tokens] for values in self))


def ppo(
    token_logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_range: float = 0.2
) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7): ``max(-A ratio, -A clip(ratio))``.

    The derivative by the log-prob is ``-A ratio`` where the ratio is not clipped, and 0 where it
    is: above ``1 + clip_range`` for positive, below ``1 - clip_range`` for negative advantages.
    """
    ratio = (token_logps - old_logps).clamp(max=_LARGEST_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def is_clipped(
    token_logps: Tensor, old_logps: Tensor, advantages: Tensor, clip_range: float
) -> Tensor:
    """``[N]`` bool: the clipped side is the one that counts, so that the token has no gradient."""
    ratio = (token_logps - old_logps).exp()
    above = (ratio > 1 + clip_range) & (advantages > 0)
    return above | ((ratio < 1 - clip_range) & (advantages < 0))


def value_loss(
    values: Tensor, returns: Tensor, old_values: Tensor, clip_range: float | None = None
) -> Tensor:
    """``(V - R)^2 / 2``; with ``clip_range`` at least that of ``V`` kept near its old value.

    ``max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2``, as PPO implementations have it.
    """
    errors = (values - returns).square()
    if clip_range is not None:
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, (near - returns).square())
    return 0.5 * errors


def policy_losses(config: OnlineConfig, token_logps: Tensor, data: TokenData) -> Tensor:
    """``[N]`` losses of the algorithm that the configuration names; differentiable."""
    if config.algorithm == "apa":
        return apa(token_logps, data.ref_logps, data.advantages, lam=config.kl_lambda)
    if config.algorithm == "awr":
        return awr(
            token_logps, data.advantages, lam=config.kl_lambda,
            max_weight=config.max_advantage_weight,
        )  # fmt: skip
    return ppo(token_logps, data.old_logps, data.advantages, clip_range=config.clip_range)
