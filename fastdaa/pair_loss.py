"""Hidden states, head, selection and reference log-probs to a preference loss, in one call.

The planner takes the single pass (3U) where the head is trained and the loss is known within a
chunk of whole pairs, and the differentiable log-probs of :mod:`fastdaa.logps` elsewhere. Whichever
path is taken, the same objective is evaluated on the same vectors: no formula exists twice.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastdaa.head import LmHead
from fastdaa.logps import head_logps, pair_logps, sequence_logps, token_stats
from fastdaa.losses import Objective
from fastdaa.outputs import BatchTotals, PairLogps, PairLossOutput, TokenSelection, TokenStats
from fastdaa.planner import HeadPlan, plan_head
from fastdaa.single_pass import Chunk, SinglePass, chunks_of_pairs
from fastdaa.validation import check_head_inputs, check_indices, check_shape


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
        ref_logps: ``[2B]`` reference log-probs of the sequences, in nats.
        ref_token_logps: ``[N]`` reference log-probs of the tokens, instead of or (for objectives
            with token-level terms) beside ``ref_logps``.
        completion_lengths: ``[2B]`` int64 divisors of per-token means; None for the scored tokens.
        advantages: ``[2B]`` advantages of the completions, for token-level objectives.
        totals: sizes of the whole batch, if these pairs are only a part of it. The losses of the
            parts then add up to the loss of the batch.
        stats: also return entropy, top-1 hits and mean logit of every token.
        impl: ``"auto"`` or the path to take, as in :func:`fastdaa.token_logps`, and
            ``"single_pass"``.
        engine: what works on tiles of logits, as in :func:`fastdaa.token_logps`.
        max_bytes: bytes of fp32 logits held at a time; None for the default of the device.

    Returns:
        The loss and, detached, what it was made of.

    Raises:
        TypeError, ValueError: tensors that do not fit together, a missing reference, or a path
            or engine that cannot serve the call.
        ImportError: ``engine="triton"`` without the package triton.
    """
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    check_indices("selection.rows", selection.rows, (sum(selection.counts),))
    rows = flat.index_select(0, selection.rows)
    check_head_inputs(rows, head.weight, selection.targets, head.bias)
    batch = _Batch(
        selection, objective, ref_logps, ref_token_logps, completion_lengths, advantages, totals
    )
    grad = torch.is_grad_enabled()
    plan = plan_head(
        head.planned_width, rows.device,
        hidden_grad=grad and rows.requires_grad, head_grad=grad and head.trained,
        loss_inside=True, coupled=objective.coupled, impl=impl, engine=engine,
        max_bytes=max_bytes,
    )  # fmt: skip
    if plan.path == "single_pass":
        return _single_pass(rows, head, batch, plan, stats)
    logps = head_logps(
        rows, head, selection.targets, impl=plan.path, engine=engine, max_bytes=max_bytes
    )
    losses = batch.losses(logps, batch.everything)
    values = None
    if stats:
        _, values = token_stats(rows, head, selection.targets, engine=engine, max_bytes=max_bytes)
    loss = losses.sum() / batch.totals.pairs
    return batch.output(loss, losses.detach(), logps.detach(), values)


def _single_pass(
    rows: Tensor, head: LmHead, batch: _Batch, plan: HeadPlan, stats: bool
) -> PairLossOutput:
    selection = batch.selection
    if head.softcap is not None and plan.engine == "torch":
        # The slope of the cap is held beside the logits: half as many fit.
        plan = replace(plan, tile_rows=max(plan.tile_rows // 2, 1))
    loss, losses, logps, *columns = SinglePass.apply(
        rows, head.weight, head.bias, selection.targets, head.detach(), plan,
        chunks_of_pairs(selection.counts, plan.tile_rows), batch.losses, batch.totals.pairs, stats,
    )  # fmt: skip
    return batch.output(loss, losses, logps, TokenStats(*columns) if stats else None)


class _Batch:
    """Everything an objective needs beside the policy's log-probs, cut to any range of pairs."""

    def __init__(
        self,
        selection: TokenSelection,
        objective: Objective,
        ref_logps: Tensor | None,
        ref_token_logps: Tensor | None,
        completion_lengths: Tensor | None,
        advantages: Tensor | None,
        totals: BatchTotals | None,
    ):
        sequences, tokens = len(selection.counts), sum(selection.counts)
        if sequences % 2 or not sequences:
            raise ValueError(f"selection: expected 2B > 0 sequences, got {sequences}")
        check_indices("selection.lengths", selection.lengths, (sequences,))
        if ref_token_logps is not None:
            check_shape("ref_token_logps", ref_token_logps, (tokens,))
            if ref_logps is None:
                ref_logps = sequence_logps(ref_token_logps, selection.lengths)
        if ref_logps is not None:
            check_shape("ref_logps", ref_logps, (sequences,))
        elif objective.needs_ref:
            raise ValueError(f"ref_logps: expected [{sequences}] for {objective}, got None")
        if completion_lengths is None:
            completion_lengths = selection.lengths
        check_indices("completion_lengths", completion_lengths, (sequences,))
        if advantages is not None:
            check_shape("advantages", advantages, (sequences,))
        self.selection, self.objective, self.advantages = selection, objective, advantages
        self.completion_lengths = completion_lengths
        self.ref_logps, self.ref_token_logps = ref_logps, ref_token_logps
        here = BatchTotals(sequences // 2, max(sum(selection.counts[::2]), 1), tokens)
        self.totals = here if totals is None else totals
        self.everything = Chunk(slice(0, sequences // 2), slice(0, tokens))

    def losses(self, token_logps: Tensor, chunk: Chunk) -> Tensor:
        """Losses ``[b]`` of the pairs of a chunk from its token log-probs ``[n]``."""
        sequences = slice(2 * chunk.pairs.start, 2 * chunk.pairs.stop)
        lengths = self.selection.lengths[sequences]
        completion = self.completion_lengths[sequences]
        policy = pair_logps(sequence_logps(token_logps, lengths), completion)
        ref = None
        if self.ref_logps is not None:
            ref = pair_logps(self.ref_logps[sequences].to(policy.chosen.dtype), completion)
        token_part = None
        if self.objective.has_token_level:
            ref_tokens, advantages = self.ref_token_logps, self.advantages
            token_part = self.objective.token_losses(
                token_logps,
                None if ref_tokens is None else ref_tokens[chunk.tokens],
                lengths,
                advantages=None if advantages is None else advantages[sequences],
                pairs=self.totals.pairs,
                tokens=self.totals.tokens or sum(self.selection.counts),
            )
        return self.objective(policy, ref, self.totals, token_part)

    def output(
        self, loss: Tensor, losses: Tensor, logps: Tensor, stats: TokenStats | None
    ) -> PairLossOutput:
        """The public result."""
        sums = sequence_logps(logps, self.selection.lengths)
        policy: PairLogps = pair_logps(sums, self.completion_lengths)
        return PairLossOutput(loss, losses, policy, logps, stats)
