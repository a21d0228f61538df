"""Hidden states, head, selection and reference log-probs to a preference loss, in one call.

The planner takes the single pass (3U) where the head is trained and the loss is known within a
chunk of whole pairs, and the differentiable log-probs of :mod:`fastdaa.logps` elsewhere. Whichever
path is taken, the same objective is evaluated on the same vectors: no formula exists twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.chunks import chunks_of_pairs
from fastdaa.compiled_loss import References, compiled_pair_loss
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.logps import head_logps_and_stats
from fastdaa.losses import Objective
from fastdaa.outputs import BatchTotals, PairLossOutput, TokenSelection, TokenStats
from fastdaa.pair_batch import PairBatch, weighting_of
from fastdaa.selection import select_rows
from fastdaa.single_pass import plan_loss, single_pass
from fastdaa.validation import (
    check_floating,
    check_head_inputs,
    check_indices,
    check_kind,
    check_whole,
)


def pair_loss(
    hidden_states: Tensor,
    head: LmHead,
    selection: TokenSelection,
    objective: Objective,
    *,
    ref_logps: Tensor | None = None,
    ref_token_logps: Tensor | None = None,
    completion_lengths: Tensor | None = None,
    advantages: Tensor | None = None,
    totals: BatchTotals | None = None,
    stats: bool = False,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
) -> PairLossOutput:
    """Mean preference loss over ``B`` pairs, differentiable towards hidden states and head.

    Args:
        hidden_states: ``[..., D]`` of the backbone; flattened, its rows are what
            ``selection.rows`` points at.
        head: the LM head, see :meth:`fastdaa.LmHead.from_model`.
        selection: scored tokens of ``2B`` pair-major sequences, see
            :func:`fastdaa.select_pairs`.
        objective: what to minimise, e.g. ``Objective.parse("dpo", beta=0.1)``.
        ref_logps: ``[2B]`` reference log-probs of the sequences, in nats; a constant, as
            ``ref_token_logps`` and ``advantages`` are. Not read with ``ld_alpha``.
        ref_token_logps: ``[N]`` reference log-probs of the tokens, instead of or (for objectives
            with token-level terms or ``ld_alpha``) beside ``ref_logps``.
        completion_lengths: ``[2B]`` int64 divisors of per-token means; None for the scored tokens.
        advantages: ``[2B]`` advantages of the completions, for objectives with token-level terms;
            an error with others.
        totals: sizes of the whole batch, if these pairs are only a part of it. The losses of the
            parts then add up to the loss of the batch.
        stats: also return the :class:`fastdaa.TokenStats` of every token.
        impl: ``"auto"`` or the path to take, as in :func:`fastdaa.token_logps`, and
            ``"single_pass"``.
        engine: what works on tiles of logits, as in :func:`fastdaa.token_logps`.
        max_bytes: memory beyond inputs and returned gradients, as in :func:`fastdaa.plan_head`;
            None for the default of the device.

    Returns:
        The loss and, detached, what it was made of.

    Raises:
        TypeError, ValueError: tensors that do not fit together, a missing reference, or a path
            or engine that cannot serve the call.
        ImportError: ``engine="triton"`` without the package triton.
    """
    _check_kinds(hidden_states, head, selection, objective)
    references = References(ref_logps, ref_token_logps, completion_lengths, advantages)
    call = _compiled if torch.compiler.is_compiling() else _eager
    return call(
        hidden_states.reshape(-1, hidden_states.shape[-1]), head, selection, objective, references,
        totals, stats=stats, impl=impl, engine=engine, max_bytes=max_bytes,
    )  # fmt: skip


def _check_kinds(
    hidden_states: Tensor, head: LmHead, selection: TokenSelection, objective: Objective
) -> None:
    check_floating("hidden_states", hidden_states)
    check_whole("hidden_states", hidden_states)
    if not hidden_states.ndim:
        raise ValueError("hidden_states: expected shape [..., D], got []")
    check_kind("head", head, LmHead, "LmHead(weight)")
    check_kind("selection", selection, TokenSelection, "select_pairs(labels)")
    # What has all that one has will do; Dynamo of torch 2.11 cannot trace hasattr of a property.
    given: object = objective
    if not isinstance(given, Objective) and not hasattr(given, "has_token_level"):
        name = given if isinstance(given, str) else "dpo"
        check_kind("objective", given, Objective, f"Objective.parse({name!r})")


def _compiled(
    flat: Tensor, head: LmHead, selection: TokenSelection, objective: Objective, *args: Any,
    **options: Any,
) -> PairLossOutput:  # fmt: skip
    return compiled_pair_loss(flat, head, selection, objective, *args, **options)


def _eager(
    flat: Tensor, head: LmHead, selection: TokenSelection, objective: Objective,
    references: References, totals: BatchTotals | None, *, stats: bool, impl: str, engine: str,
    max_bytes: int | None,
) -> PairLossOutput:  # fmt: skip
    tokens = sum(selection.counts)
    check_indices("selection.rows", selection.rows, (tokens,))
    targets = selection.targets
    check_head_inputs(flat, head.weight, targets, head.bias, head.vocab_size, tokens=tokens)
    told, stats = stats, stats or weighting_of(objective)[1]
    plan = plan_loss(
        flat, head, coupled=objective.coupled, sparse=objective.sparse, tokens=tokens, stats=stats,
        impl=impl, engine=engine, max_bytes=max_bytes, counts=selection.counts,
    )  # fmt: skip
    memory: dict[str, Any] = {"engine": engine, "max_bytes": max_bytes}
    batch = PairBatch(selection, objective, *references, totals, plan.engine)
    if plan.path == "single_pass":
        return _single_pass(flat, head, batch, plan, stats, told)
    if plan.path == "reference":
        flat = select_rows(flat, selection.rows)
    else:
        memory["positions"] = selection.rows
    logps, values = head_logps_and_stats(
        flat, head, targets, stats=stats, impl=plan.path, sparse=objective.sparse, **memory
    )
    losses = batch.losses(logps, batch.everything, values)
    loss = losses.sum() / batch.totals.pairs
    return batch.output(loss, losses.detach(), logps.detach(), values, told)


def _single_pass(
    flat: Tensor, head: LmHead, batch: PairBatch, plan: HeadPlan, stats: bool, told: bool
) -> PairLossOutput:
    selection = batch.selection
    chunks = chunks_of_pairs(selection.counts, plan.chunk_tokens)
    loss, losses, logps, *columns = single_pass(
        flat, head, selection.targets, plan, chunks, batch.evaluate, batch.totals.pairs, stats,
        selection.rows,
    )  # fmt: skip
    values = TokenStats(*columns) if stats else None
    return batch.output(loss, losses, logps, values, told)
