"""A loss of tokens from hidden states and head: 3U where the head is trained, no logits kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.chunks import Chunk
from fastdaa.head import LmHead
from fastdaa.logps import head_logps
from fastdaa.outputs import TokenStats
from fastdaa.single_pass import plan_loss, single_pass
from fastdaa.tiles import blocks

TokenObjective = Callable[[Tensor, slice], Tensor]
"""Log-probs ``[m]`` of the tokens ``slice`` to their losses ``[m]``, differentiable."""


class TokenLoss(NamedTuple):
    """What :func:`token_loss` returns."""

    loss: Tensor
    """Scalar with gradient: the sum of ``losses`` over the divisor."""
    losses: Tensor
    """``[n]``, detached."""
    logps: Tensor
    """``[n]``, detached."""


def token_loss(
    rows: Tensor,
    head: LmHead,
    targets: Tensor,
    objective: TokenObjective,
    divisor: int,
    *,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
) -> TokenLoss:
    """``sum(objective(log p(targets))) / divisor``, differentiable towards ``rows`` and head.

    A token's loss depends on its own log-prob alone. So its coefficient is known as soon as its
    logits are, and one computation of them serves loss and gradients (the single pass).

    Args:
        rows: ``[n, D]`` hidden states that predict ``targets``.
        head: the LM head, temperature included.
        targets: ``[n]`` int64.
        divisor: tokens of the whole minibatch, of which these may be a part.
        impl, engine, max_bytes: as in :func:`fastdaa.pair_loss`.
    """
    plan = plan_loss(rows, head, impl=impl, engine=engine, max_bytes=max_bytes)
    if plan.path != "single_pass":
        logps = head_logps(rows, head, targets, impl=plan.path, engine=engine, max_bytes=max_bytes)
        losses = objective(logps, slice(0, len(targets)))
        return TokenLoss(losses.sum() / divisor, losses.detach(), logps.detach())

    def evaluate(
        token_logps: Tensor, chunk: Chunk, stats: TokenStats | None
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = token_logps.detach().requires_grad_()
            losses = objective(leaf, chunk.tokens)
            (coefficients,) = torch.autograd.grad(losses.sum() / divisor, leaf)
        return losses.detach(), coefficients

    chunks = [Chunk(tokens, tokens) for tokens in blocks(len(targets), plan.chunk_tokens)]
    loss, losses, logps, *_ = single_pass(
        rows, head, targets, plan, chunks, evaluate, divisor, False
    )
    return TokenLoss(loss, losses, logps)
