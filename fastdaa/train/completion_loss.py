"""Negative log-likelihood of tokens from hidden states and head, without logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.chunks import Chunk
from fastdaa.head import LmHead
from fastdaa.logps import head_logps_and_stats
from fastdaa.outputs import TokenStats
from fastdaa.single_pass import plan_loss, single_pass
from fastdaa.tiles import blocks


class CompletionLoss(NamedTuple):
    """What :func:`completion_loss` returns."""

    total: Tensor
    """Scalar with gradient: the negative log-probs of all tokens added up, in nats."""
    logps: Tensor
    """``[N]`` log-probs of the tokens, detached."""
    stats: TokenStats | None
    """Token statistics, if asked for."""


def completion_loss(
    rows: Tensor,
    head: LmHead,
    targets: Tensor,
    *,
    stats: bool = False,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
) -> CompletionLoss:
    """``-sum(log p(targets))``, differentiable towards ``rows`` and head.

    Every token has the coefficient -1, so loss and gradients come from one computation of the
    logits (3U with a trained head).

    Args:
        rows: ``[N, D]`` hidden states that predict ``targets``.
        head: the LM head.
        targets: ``[N]`` int64.
        stats: also the :class:`fastdaa.TokenStats` of every token.
        impl, engine, max_bytes: as in :func:`fastdaa.pair_loss`.
    """
    plan = plan_loss(rows, head, stats=stats, impl=impl, engine=engine, max_bytes=max_bytes)
    if plan.path != "single_pass":
        logps, values = head_logps_and_stats(
            rows, head, targets, stats=stats, impl=plan.path, engine=engine, max_bytes=max_bytes
        )
        return CompletionLoss(-logps.double().sum().to(logps.dtype), logps.detach(), values)
    chunks = [Chunk(tokens, tokens) for tokens in blocks(len(targets), plan.chunk_tokens)]
    loss, _, logps, *columns = single_pass(rows, head, targets, plan, chunks, _negative, 1, stats)
    return CompletionLoss(loss, logps, TokenStats(*columns) if stats else None)


def _negative(token_logps: Tensor, chunk: Chunk, stats: TokenStats | None) -> tuple[Tensor, Tensor]:
    """Losses of the tokens and their derivatives by the log-probs."""
    return -token_logps, torch.full_like(token_logps, -1.0)
