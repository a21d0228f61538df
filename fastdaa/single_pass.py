"""3U: loss and gradients from one computation of the logits, nothing recomputed.

For every sequence-level objective ``dL/dz_i = g_i (onehot_i - p_i)`` with coefficients ``g`` that
are known as soon as the log-probs of a pair are. A chunk of whole pairs therefore goes from logits
to statistics to coefficients to gradients while its logits are at hand. Gradients of logits in bf16
wait for the coefficients instead: :mod:`fastdaa.kept`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.chunks import Chunk, ChunkObjective
from fastdaa.engines import RowTile, logits_memory
from fastdaa.first_order import first_order
from fastdaa.gradient_sums import GradientSums, HeadSums, dtypes_of
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.kept import Kept
from fastdaa.kept_chunks import KeptChunks
from fastdaa.outputs import STATISTICS, TokenStats
from fastdaa.plan_call import plan_call
from fastdaa.row_passes import RowState
from fastdaa.score import join, statistics_of
from fastdaa.selection import select_rows
from fastdaa.tiles import (
    GradientFactor,
    Logits,
    blocks,
    filled_rows,
    without_autocast,
)

plan_loss = partial(plan_call, loss_inside=True)
"""The plan of a call that hands over its loss."""


def single_pass(
    rows: Tensor, head: LmHead, targets: Tensor, plan: HeadPlan, chunks: list[Chunk],
    objective: ChunkObjective, pairs: int, stats: bool, positions: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What :class:`SinglePass` returns, by the plan's way; chunks of ``plan.chunk_tokens``.

    With ``positions [N]``, ``rows`` are hidden states of more positions, ``[P, D]``, of which a
    chunk copies those that it needs.
    """
    call = (rows, head.weight, head.bias, targets, head.detach(), plan)
    if not plan.kept_whole:
        return SinglePass.apply(*call, positions, chunks, objective, pairs, stats)
    if positions is not None:
        call = (select_rows(rows, positions), *call[1:])
    (everything,) = chunks
    return Kept.apply(*call, everything, objective, pairs, stats)


class SinglePass(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, targets, head, plan, positions, chunks, objective,
    pairs, stats)``.

    Returns ``sum(losses) / pairs`` (the only differentiable output), the losses ``[B]``, the token
    log-probs ``[N]`` and the token statistics (empty unless ``stats``).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        head: LmHead, plan: HeadPlan, positions: Tensor | None, chunks: list[Chunk],
        objective: ChunkObjective, pairs: int, stats: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Loss and all gradients."""
        logits = Logits(hidden_states, head, engine=plan.engine, positions=positions)
        wanted = ctx.needs_input_grad[:3]
        (losses, *rest), sums = run_single_pass(
            logits, targets, plan, chunks, objective, wanted, stats
        )
        ctx.save_for_backward(positions, *sums.fields().values())
        ctx.count, ctx.dtypes = hidden_states.shape[0], dtypes_of(hidden_states, weight, bias)
        ctx.mark_non_differentiable(losses, *rest)
        return losses.sum() / pairs, losses, *rest

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """A scale; the saved sums stay as they are, so that backward can run again."""
        positions, *sums = ctx.saved_tensors
        grads = HeadSums.join(sums).scaled(grad_loss, ctx.dtypes, positions, ctx.count)
        return *grads, None, None, None, None, None, None, None, None


def run_single_pass(
    logits: Logits, targets: Tensor, plan: HeadPlan, chunks: list[Chunk],
    objective: ChunkObjective, wanted: tuple[bool, bool, bool], stats: bool,
) -> tuple[list[Tensor], HeadSums]:  # fmt: skip
    """Losses ``[B]``, log-probs ``[N]``, the statistics, and the gradients."""
    longest = max((c.tokens.stop - c.tokens.start for c in chunks), default=0)
    device = logits.hidden_states.device
    with without_autocast(device):
        run: KeptChunks | _HeldChunks
        if plan.kept_tokens:
            run = KeptChunks(logits, targets, plan, wanted, stats, longest)
        else:
            run = _HeldChunks(logits, targets, plan, wanted, stats)
        losses = [run.chunk(chunk, objective) for chunk in chunks]
        empty = torch.zeros(0, dtype=logits.wide, device=device)
        results = [torch.cat(losses or [empty]), torch.cat(run.logps or [empty])]
        results += join(run.values, STATISTICS, empty)
        sums = run.grads
        del run  # and what it holds of logits
        return results, sums.finish(waits=True)


class _Block(NamedTuple):
    """Rows that go through the elementwise passes together, while they are in the cache."""

    rows: slice
    tile: RowTile
    state: RowState
    values: TokenStats | None


class _HeldChunks:
    """One forward whose chunks hold their logits: the sums, and the buffer that all share."""

    def __init__(
        self,
        logits: Logits,
        targets: Tensor,
        plan: HeadPlan,
        wanted: tuple[bool, bool, bool],
        stats: bool,
    ):
        self.logits, self.targets, self.plan, self.stats = logits, targets, plan, stats
        self.grads = GradientSums(logits, wanted)
        self.logps: list[Tensor] = []
        self.values: list[TokenStats] = []
        self.columns = slice(0, logits.head.width)
        self.weight = logits.columns(self.columns)
        self.device = logits.hidden_states.device
        self.buffer: Tensor | None = None

    def chunk(self, chunk: Chunk, objective: ChunkObjective) -> Tensor:
        """Losses ``[b]`` of one chunk; its gradients are added to the sums."""
        start, stop = chunk.tokens.start, chunk.tokens.stop
        parts = [
            (start + b.start, start + b.stop) for b in blocks(stop - start, self.plan.tile_rows)
        ]
        again = len(parts) > 1  # a pair beyond the budget is computed twice, a part at a time
        held: list[_Block] = []
        logps: list[Tensor] = []
        first = len(self.values)
        for part in parts:
            held = list(self._forward(*part))
            self._record(held)
            logps += [block.state.logps for block in held]
            if again:
                held = []  # before the next part is made
        empty = self.weight.new_zeros(0, dtype=self.logits.wide)
        token_logps = torch.cat(logps or [empty])
        self.logps.append(token_logps)
        more = statistics_of(self.values[first:], empty) if self.stats else None
        losses, coefficients = objective(token_logps, chunk, more)
        factor = GradientFactor(self.logits, coefficients)
        for part in parts:
            part_coefficients = coefficients[part[0] - start : part[1] - start]
            made = list(self._forward(*part)) if again else held
            self._backward(made, part_coefficients, factor)
            del made  # before the next part is made
        return losses

    def _forward(self, start: int, stop: int) -> Iterator[_Block]:
        """Logits of the rows into the buffer, block by block, and their statistics."""
        logits = self.logits
        # Half-precision products bring their own memory.
        wanted = filled_rows(stop - start, self.device)
        space = self._space(wanted) if logits.operand == logits.wide else None
        size = self.plan.block_rows if self.device.type == "cpu" else max(stop - start, 1)
        for b in blocks(stop - start, size):
            rows = slice(start + b.start, start + b.stop)
            filled = filled_rows(b.stop - b.start, self.device)
            out = None if space is None else space[b.start : b.start + filled]
            tile = logits.row_tile(
                logits.rows(rows), self.weight, self.columns, out, self.plan.block_rows
            )
            state, values = tile.statistics(self.targets[rows], self.stats, keep=True)
            yield _Block(rows, tile, state, values)

    def _space(self, rows: int) -> Tensor:
        if self.buffer is None or self.buffer.shape[0] < rows:
            self.buffer = None  # the old one goes before the new one comes
            width, wide = self.columns.stop, self.logits.wide
            self.buffer = logits_memory(rows, width, self.device, wide)
        return self.buffer[:rows]

    def _record(self, held: list[_Block]) -> None:
        self.values += [block.values for block in held if block.values is not None]

    def _backward(self, held: list[_Block], coefficients: Tensor, factor: GradientFactor) -> None:
        """Gradients of one part; rows of coefficient 0 stay out of products if the plan says so."""
        if not held:
            return
        start = held[0].rows.start
        scaled = factor.scaled(coefficients)
        parts = [scaled[b.rows.start - start : b.rows.stop - start] for b in held]
        if self.plan.sparse:
            active = [g.nonzero()[:, 0] for g in parts]
            if sum(rows.shape[0] for rows in active) < scaled.shape[0]:
                for block, g, picked in zip(held, parts, active, strict=True):
                    self._backward_active(block, g, picked, factor)
                return
        made = [
            block.tile.gradient(block.state, self.targets[block.rows], g)
            for block, g in zip(held, parts, strict=True)
        ]
        # The products take the whole part: each reads and writes the weight's sum once.
        rows = slice(start, held[-1].rows.stop)
        # Without the buffer a part is one block: there are half-precision products on GPUs alone.
        whole = made[0] if len(made) == 1 else self._space(rows.stop - rows.start)
        self.grads.add(whole, factor, self.logits.rows(rows), self.weight, rows)

    def _backward_active(
        self, block: _Block, g: Tensor, active: Tensor, factor: GradientFactor
    ) -> None:
        if active.numel() == 0:
            return
        rows = active + block.rows.start
        dz = block.tile.gradient(block.state, self.targets[block.rows], g, active)
        self.grads.add(dz, factor, self.logits.rows(rows), self.weight, rows)
