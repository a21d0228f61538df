"""Generalised advantage estimation on ragged sequences, and whitening."""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-8


def gae(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every token (arXiv 1506.02438, eq. 16).

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lambda A_{t+1}``, with a
    value and an advantage of 0 after the last token of each sequence, whether it ended by itself or
    was cut off. Returns are ``A + V``, before any whitening.

    Args:
        rewards: ``[N]``, sequence by sequence.
        values: ``[N]``, of the state in which each token was chosen.
        lengths: ``[S]`` int64, at least 1 each, with sum ``N``.
        gamma: discount.
        gae_lambda: 0 for one-step errors, 1 for whole returns.

    Returns:
        Two ``[N]`` tensors in the dtype of ``values``, without gradient.
    """
    with torch.no_grad():
        r, v = pad(rewards, lengths), pad(values, lengths)
        after = torch.zeros_like(v[:, 0])
        next_value, advantage = after, after
        columns = []
        # Behind the end of a sequence everything is 0, and so is what is carried to its last token.
        for t in range(r.shape[1] - 1, -1, -1):
            delta = r[:, t] + gamma * next_value - v[:, t]
            advantage = delta + gamma * gae_lambda * advantage
            columns.append(advantage)
            next_value = v[:, t]
        advantages = unpad(torch.stack(columns[::-1], dim=1), lengths)
        return advantages, advantages + values


def whiten(advantages: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the given tokens (the mean of squares is 1), ``[N]``.

    A single token, or equal ones, become 0.
    """
    centred = advantages - advantages.mean()
    return centred * torch.rsqrt(centred.square().mean() + _EPSILON)


def whiten_with_padding(advantages: Tensor, lengths: Tensor) -> Tensor:
    """Whitening as the code of arXiv 2306.02231 does it, for parity: padding counts as zeros.

    Mean and (unbiased) variance are those of the padded ``[S, T]`` rectangle, so they depend on how
    unequal the lengths are. The tokens themselves do not get mean 0 and variance 1.
    """
    padded = pad(advantages, lengths)
    if padded.numel() == 1:
        return torch.zeros_like(advantages)
    variance, mean = torch.var_mean(padded)
    return (advantages - mean) * torch.rsqrt(variance + _EPSILON)


def pad(ragged: Tensor, lengths: Tensor) -> Tensor:
    """``[N]`` to ``[S, T]``, from the left, zeros behind the ends."""
    mask = _mask(lengths.to(ragged.device))
    return ragged.new_zeros(mask.shape).masked_scatter(mask, ragged)


def unpad(padded: Tensor, lengths: Tensor) -> Tensor:
    """``[S, T]`` to ``[N]``, without what is behind the ends."""
    return padded[_mask(lengths.to(padded.device))]


def _mask(lengths: Tensor) -> Tensor:
    width = int(lengths.max()) if len(lengths) else 0
    return torch.arange(width, device=lengths.device)[None] < lengths[:, None]
