"""The readable oracle: logits materialised, autograd as torch does it, any dtype up to fp64.

This is the specification. Every faster path of the library is tested against it, and nothing
here is used by them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.outputs import TokenStats


def logits(
    hidden_states: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """``cap(scale * (hidden_states @ weight.T + bias)) / temperature`` with
    ``cap(z) = softcap * tanh(z / softcap)``.

    Args:
        hidden_states: ``[N, D]``. weight: ``[V, D]``. bias: ``[V]``.

    Returns:
        ``[N, V]`` in fp32, or fp64 if an input is fp64.
    """
    dtype = torch.promote_types(torch.promote_types(hidden_states.dtype, weight.dtype), torch.float)
    z = hidden_states.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logps(hidden_states: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> Tensor:
    """Log-probability of ``targets [N]`` in nats, ``[N]``; keyword arguments of :func:`logits`."""
    logps = torch.log_softmax(logits(hidden_states, weight, **head), dim=-1)
    return logps.gather(1, targets[:, None])[:, 0]


def token_stats(hidden_states: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> TokenStats:
    """Statistics of every position; keyword arguments of :func:`logits`."""
    z = logits(hidden_states, weight, **head).detach()
    logps = torch.log_softmax(z, dim=-1)
    entropy = -torch.special.xlogy(logps.exp(), logps.exp()).sum(dim=-1)
    top1 = z.gather(1, targets[:, None])[:, 0] >= z.amax(dim=-1)
    log_sum_sq = torch.logsumexp(2 * logps, dim=-1)
    return TokenStats(entropy, top1.to(z.dtype), z.mean(dim=-1), log_sum_sq)


def sequence_logps(token_logps: Tensor, counts: tuple[int, ...] | list[int]) -> Tensor:
    """Sum token log-probs ``[N]`` sequence by sequence to ``[S]``; an empty sequence gives 0."""
    return torch.stack([part.sum() for part in token_logps.split(list(counts))])


def kl_divergence(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    """``KL(policy || ref)`` in nats at every position: ``[N, V]``, ``[N, V]`` to ``[N]``."""
    policy = torch.log_softmax(policy_logits, dim=-1)
    ref = torch.log_softmax(ref_logits, dim=-1)
    return torch.where(policy == -torch.inf, 0.0, policy.exp() * (policy - ref)).sum(dim=-1)
