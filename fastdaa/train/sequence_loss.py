"""A loss of whole sequences, each by itself, from hidden states and head, without logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.chunks import Chunk, chunks_of_pairs
from fastdaa.head import LmHead
from fastdaa.logps import head_logps_and_stats, sequence_logps
from fastdaa.outputs import TokenSelection, TokenStats
from fastdaa.single_pass import plan_loss, single_pass

SequenceObjective = Callable[[Tensor, slice], Tensor]
"""Log-probs ``[s]`` of some sequences, and which of all they are, to their losses ``[s]``."""


class SequenceLoss(NamedTuple):
    """What :func:`sequence_loss` returns."""

    loss: Tensor
    """Scalar with gradient: the losses added up and divided."""
    losses: Tensor
    """``[S]``, detached."""
    logps: Tensor
    """``[S]`` log-probs of the sequences, detached."""
    stats: TokenStats | None
    """``[N]`` statistics of the tokens, if asked for."""


def sequence_loss(
    rows: Tensor,
    head: LmHead,
    selection: TokenSelection,
    objective: SequenceObjective,
    divisor: int,
    *,
    stats: bool = False,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
) -> SequenceLoss:
    """``sum(objective(logps)) / divisor``, differentiable towards ``rows`` and head.

    The loss of a sequence depends on that sequence alone, so loss and gradients come from one
    computation of the logits (3U with a trained head).

    Args:
        rows: ``[N, D]`` hidden states that predict ``selection.targets``.
        head: the LM head.
        selection: the scored tokens of ``S`` sequences; where they lie is not read.
        objective: see :data:`SequenceObjective`.
        divisor: sequences of the whole batch.
        stats: also the :class:`fastdaa.TokenStats` of every token.
        impl, engine, max_bytes: as in :func:`fastdaa.pair_loss`.
    """
    targets, lengths, counts = selection[1:]
    plan = plan_loss(rows, head, stats=stats, impl=impl, engine=engine, max_bytes=max_bytes)
    if plan.path != "single_pass":
        token_logps, values = head_logps_and_stats(
            rows, head, targets, stats=stats, impl=plan.path, engine=engine, max_bytes=max_bytes
        )
        logps = sequence_logps(token_logps, lengths)
        losses = objective(logps, slice(0, len(counts)))
        return SequenceLoss(losses.sum() / divisor, losses.detach(), logps.detach(), values)

    def evaluate(
        token_logps: Tensor, chunk: Chunk, stats: TokenStats | None
    ) -> tuple[Tensor, Tensor]:
        """Losses of the sequences of a chunk, and the derivatives by their tokens' log-probs."""
        with torch.enable_grad():
            own = lengths[chunk.pairs]
            leaf = sequence_logps(token_logps.detach(), own).requires_grad_()
            losses = objective(leaf, chunk.pairs)
            (slopes,) = torch.autograd.grad(losses.sum() / divisor, leaf)
        # A sum has the same derivative by each of its tokens.
        size = token_logps.shape[0]
        return losses.detach(), slopes.repeat_interleave(own, output_size=size)

    # Pairs whose second sequence is empty: chunks hold whole sequences.
    chunks = chunks_of_pairs(tuple(n for count in counts for n in (count, 0)), plan.chunk_tokens)
    loss, losses, token_logps, *columns = single_pass(
        rows, head, targets, plan, chunks, evaluate, divisor, stats
    )
    logps = sequence_logps(token_logps, lengths)
    return SequenceLoss(loss, losses, logps, TokenStats(*columns) if stats else None)
