"""Exact Kullback-Leibler divergence between two heads' distributions, token by token.

Sampled log-ratios (k1) estimate the same quantity with far more variance; here every position
contributes its expectation over the whole vocabulary, without an ``[N, V]`` tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.head import LmHead
from fastdaa.planner import plan_head
from fastdaa.tiles import Logits, blocks, without_autocast
from fastdaa.validation import check_product


@torch.no_grad()
def token_kl(
    hidden_states: Tensor,
    head: LmHead,
    ref_hidden_states: Tensor,
    ref_head: LmHead,
    *,
    max_bytes: int | None = None,
) -> Tensor:
    """``KL(policy || ref)`` of the next-token distributions at every position, no gradient.

    One pass over the vocabulary computes each logit of both heads once (2U).

    Args:
        hidden_states: ``[N, D]`` of the policy.
        head: head of the policy.
        ref_hidden_states: ``[N, D']`` of the reference at the same positions.
        ref_head: head of the reference, over the same vocabulary.
        max_bytes: bytes of fp32 logits held at a time, for each of the two.

    Returns:
        ``[N]`` in nats, fp32 (fp64 for fp64 inputs). Infinite where the reference excludes a
        token that the policy does not.

    Raises:
        TypeError, ValueError: inputs of a wrong dtype or shape, another number of positions or
            another vocabulary.
    """
    check_product(hidden_states, head.weight)
    check_product(ref_hidden_states, ref_head.weight, "ref_")
    if hidden_states.shape[0] != ref_hidden_states.shape[0]:
        raise ValueError(
            f"ref_hidden_states: expected {hidden_states.shape[0]} positions as in hidden_states, "
            f"got {ref_hidden_states.shape[0]}"
        )
    if head.vocab_size != ref_head.vocab_size:
        raise ValueError(
            f"ref_head: expected a vocabulary of {head.vocab_size}, got {ref_head.vocab_size}"
        )
    plan = plan_head(
        head.vocab_size, hidden_states.device, hidden_grad=False, head_grad=False,
        max_bytes=max_bytes,
    )  # fmt: skip
    with without_autocast(hidden_states.device):
        policy, ref = Logits(hidden_states, head), Logits(ref_hidden_states, ref_head)
        parts = [
            _kl_of_rows(policy, ref, rows)
            for rows in blocks(hidden_states.shape[0], plan.block_rows)
        ]
    return torch.cat(parts) if parts else hidden_states.new_zeros(0, dtype=policy.wide)


def _kl_of_rows(policy: Logits, ref: Logits, rows: slice) -> Tensor:
    """``KL = sum_v e_v (y_v - y'_v) / s - log s + log s'``.

    ``y`` are logits less the row's maximum, ``e = exp(y)``, ``s`` their sum; primes: the reference.
    """
    everything = slice(0, policy.head.vocab_size)
    y = _centred(policy.tile(policy.rows(rows), policy.columns(everything), everything))
    ref_y = _centred(ref.tile(ref.rows(rows), ref.columns(everything), everything))
    e = y.exp()
    s = e.sum(dim=1)
    gap = torch.where(e > 0, y.sub_(ref_y), 0.0).mul_(e)
    return gap.sum(dim=1) / s - s.log() + ref_y.exp_().sum(dim=1).log()


def _centred(z: Tensor) -> Tensor:
    return z.sub_(z.amax(dim=1, keepdim=True))
