"""3U with bf16 factors: gradients of logits are kept without the numbers that the loss brings.

For every sequence-level objective ``dL/dz_i = c_i (onehot_i - p_i)``, one number ``c_i`` a row. The
rest of the row needs no loss, so forward makes it while a tile of logits is at hand, and rounds it
to the dtype of the next product: 2 bytes a logit. The numbers join later, on the rows of the hidden
states' gradient, and on the hidden states as a factor of the weight's gradient. The entry of the
target, ``o_i = 1 - p_i``, is the largest of its row. It stays out of the products, which round
their factors:

    dH = c * (f * (dz W) + o * W[targets]),    dW = dz^T (c * f * H),  dW[targets] += c * o * H

with the factors ``f`` of the rows of ``dz``.

Where the whole batch fits (:class:`Kept`) the products wait for backward, where the loss's own
gradient is known too: no fp32 sum of the weight's gradient, and each entry of both is rounded once
to the dtype of its tensor. Where it does not, chunks of whole pairs add to wide sums
(:class:`KeptChunks`): twice as many tokens as their logits would let in, so half as many passes
over the sum. In fp16, rounding ``c * H`` costs more than rounding ``c * dz`` where logits are
small, so fp16 is left to chunks of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.chunks import Chunk, ChunkObjective
from fastdaa.engines import logits_memory
from fastdaa.first_order import first_order
from fastdaa.gradient_sums import GradientSums
from fastdaa.head import LmHead
from fastdaa.outputs import TokenStats
from fastdaa.planner import HeadPlan
from fastdaa.row_passes import move_to_front
from fastdaa.score import join
from fastdaa.target_rows import TargetRows, add_column_sums, add_target_rows
from fastdaa.tiles import (
    Logits,
    blocks,
    filled_rows,
    product,
    product_slices,
    without_autocast,
    write_product,
)

# The largest share of rows that remain for which it pays to move them: 4 bytes a logit against 4 D
# FLOP a logit that is left out.
_WORTH_MOVING = 15 / 16


# Rows of the weight that join a product's result are copied, so many bytes of fp32 at a time.
_FEW_BYTES = 16 << 20


class Kept(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, targets, head, plan, objective, pairs, stats)``.

    ``objective`` takes the log-probs ``[N]`` of all tokens. Returns what
    :class:`fastdaa.single_pass.SinglePass` does.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        head: LmHead, plan: HeadPlan, objective: Callable[[Tensor], tuple[Tensor, Tensor]],
        pairs: int, stats: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Loss, coefficients, and the gradients of the logits without them."""
        logits = Logits(hidden_states, head, engine=plan.engine)
        (losses, logps, *values), kept = keep_gradients(logits, targets, plan, objective, stats)
        ctx.save_for_backward(hidden_states, weight, bias, targets, *kept)
        ctx.mark_non_differentiable(losses, logps, *values)
        return losses.sum() / pairs, losses, logps, *values

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Both products; what was saved stays as it is, so that backward can run again."""
        hidden, weight, bias, targets, dz, coefficients, own, active = ctx.saved_tensors
        rows = TargetRows(targets, coefficients * grad_loss, own * grad_loss)
        with without_autocast(hidden.device):
            grads = kept_gradients(dz, rows, active, hidden, weight, bias, ctx.needs_input_grad[:3])
        return *grads, None, None, None, None, None, None


class KeptGradients(NamedTuple):
    """What waits for the backward pass."""

    dz: Tensor
    """``[a, V]`` as :class:`Unscaled` makes it."""
    coefficients: Tensor
    """``[N]`` derivatives of the loss by the log-probs, times the factors of the rows."""
    own: Tensor
    """``[N]`` the same times the entries of the targets."""
    active: Tensor | None
    """``[a]`` rows of ``dz``, None for all."""


def keep_gradients(
    logits: Logits, targets: Tensor, plan: HeadPlan,
    objective: Callable[[Tensor], tuple[Tensor, Tensor]], stats: bool,
) -> tuple[list[Tensor], KeptGradients]:  # fmt: skip
    """Losses ``[B]``, log-probs ``[N]`` and three statistics of a batch, and what waits."""
    with without_autocast(logits.hidden_states.device):
        kept = Unscaled(logits, targets, plan, targets.shape[0], stats)
        logps = kept.make(slice(0, targets.shape[0]))
        losses, coefficients = objective(logps)
        dz, active = leave_out(kept.dz, coefficients) if plan.sparse else (kept.dz, None)
    values = join(kept.values, 3, coefficients.new_zeros(0))
    rows = coefficients * kept.factors, coefficients * kept.own
    return [losses, logps, *values], KeptGradients(dz, *rows, active)


def kept_gradients(
    dz: Tensor, rows: TargetRows, active: Tensor | None, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden states, weight and bias in their dtypes; None where not wanted.

    Args:
        dz: ``[a, V]`` as :class:`Unscaled` makes it. rows: of all ``N`` rows. active: ``[a]`` rows
            of ``dz``, None for all.
    """
    rows = rows if active is None else rows.pick(active)
    # The weight first: its factor is gone before the gradient of the hidden states comes.
    by_weight = None
    if wanted[1]:
        factor = scaled_rows(hidden, rows.coefficients, dz.dtype, active)
        by_weight = _weight_gradient(dz, factor, weight)
        del factor
        add_target_rows(by_weight, hidden, rows, active)
    by_hidden = None
    if wanted[0]:
        by_hidden = torch.empty_like(hidden) if active is None else torch.zeros_like(hidden)
        write_hidden_gradient(dz, rows, weight.to(dz.dtype), by_hidden, active)
    by_bias = None
    if wanted[2] and bias is not None:
        total = bias.new_zeros(bias.shape, dtype=rows.own.dtype)
        add_column_sums(total, dz, rows)
        by_bias = total.to(bias.dtype)
    return by_hidden, by_weight, by_bias


def _weight_gradient(dz: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """``dz^T factor [V, D]``, rounded once to the dtype of the weight."""
    grad = torch.empty_like(weight)
    write_product(grad, dz.T, factor)
    return grad


class KeptChunks:
    """One forward of a batch that does not fit: chunk after chunk into wide sums."""

    def __init__(
        self, logits: Logits, targets: Tensor, plan: HeadPlan, wanted: tuple[bool, bool, bool],
        stats: bool, longest: int,
    ):  # fmt: skip
        self.logits, self.targets, self.plan = logits, targets, plan
        self.kept = Unscaled(logits, targets, plan, min(plan.kept_tokens, longest), stats)
        self.grads = GradientSums(logits, wanted)
        self.logps: list[Tensor] = []

    @property
    def values(self) -> list[TokenStats]:
        """Token statistics of the tiles."""
        return self.kept.values

    def chunk(self, chunk: Chunk, objective: ChunkObjective) -> Tensor:
        """Losses ``[b]`` of one chunk; its gradients are added to the sums."""
        start, stop = chunk.tokens.start, chunk.tokens.stop
        parts = [
            slice(start + part.start, start + part.stop)
            for part in blocks(stop - start, self.plan.kept_tokens)
        ]
        # A pair beyond the budget is computed twice, a part at a time.
        again = len(parts) > 1
        make = self.kept.score if again else self.kept.make
        empty = self.kept.dz.new_empty(0, dtype=self.logits.wide)
        logps = torch.cat([make(part) for part in parts] or [empty])
        self.logps.append(logps)
        losses, coefficients = objective(logps, chunk)
        for part in parts:
            if again:
                self.kept.make(part, record=False)
            self._add(part, coefficients[part.start - start : part.stop - start])
        return losses

    def _add(self, rows: slice, coefficients: Tensor) -> None:
        dz, active = self.kept.dz[: rows.stop - rows.start], None
        if self.plan.sparse:
            dz, active = leave_out(dz, coefficients)
        if not dz.shape[0]:
            return
        hidden, grads, kept = self.logits.hidden_states[rows], self.grads, self.kept
        count = coefficients.shape[0]
        of = TargetRows(
            self.targets[rows], coefficients * kept.factors[:count], coefficients * kept.own[:count]
        )
        of = of if active is None else of.pick(active)
        if grads.weight is not None:
            grads.add_to_weight(dz, scaled_rows(hidden, of.coefficients, dz.dtype, active))
            add_target_rows(grads.weight, hidden, of, active)
        if grads.hidden is not None:
            write_hidden_gradient(dz, of, kept.weight, grads.hidden[rows], active)
        if grads.bias is not None:
            add_column_sums(grads.bias, dz, of)


class Unscaled:
    """``d logp / d logits`` of tokens, tile by tile: ``factors[:, None] * dz``, ``[tokens, V]`` in
    bf16, and ``own`` at the targets, where ``dz`` is 0."""

    def __init__(
        self, logits: Logits, targets: Tensor, plan: HeadPlan, tokens: int, stats: bool
    ) -> None:
        self.logits, self.targets, self.plan, self.stats = logits, targets, plan, stats
        self.columns = slice(0, logits.head.width)
        self.weight = logits.columns(self.columns)
        rows = filled_rows(tokens, self.weight.device)
        width, device = self.columns.stop, self.weight.device
        self._memory = logits_memory(rows, width, device, logits.operand)
        self.dz = self._memory[:tokens]
        self.factors, self.own = self.weight.new_empty((2, tokens), dtype=logits.wide)
        self.values: list[TokenStats] = []

    def make(self, rows: slice, record: bool = True) -> Tensor:
        """Log-probs ``[r]`` of some rows, whose gradients become the first of the buffer."""
        return self._tiles(rows, record, gradient=True)

    def score(self, rows: slice) -> Tensor:
        """Log-probs ``[r]`` alone."""
        return self._tiles(rows, True, gradient=False)

    def _tiles(self, rows: slice, record: bool, *, gradient: bool) -> Tensor:
        logps = self.weight.new_empty(rows.stop - rows.start, dtype=self.logits.wide)
        for block in blocks(logps.shape[0], self.plan.block_rows):
            at = slice(rows.start + block.start, rows.start + block.stop)
            logps[block] = self._tile(at, block if gradient else None, record)
        return logps

    def _tile(self, rows: slice, place: slice | None, record: bool) -> Tensor:
        targets, stats = self.targets[rows], self.stats and record
        hidden, here = self.logits.rows(rows), None
        if place is None:
            state, values = self.logits.statistics(hidden, self.weight, targets, stats)
        else:
            # Wide gradients are made in the memory of their logits.
            in_place = self.logits.operand == self.logits.wide
            if in_place:
                filled = filled_rows(place.stop - place.start, self.weight.device)
                here = self._memory[place.start : place.start + filled]
            tile = self.logits.row_tile(hidden, self.weight, self.columns, here)
            made = tile.slopes(targets, stats, None if in_place else self.dz[place])
            state, values = made.state, made.values
            self.factors[place], self.own[place] = made.factors, made.own
        if values is not None:
            self.values.append(values)
        return state.logps


def leave_out(dz: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
    """``dz`` with its rows of coefficient 0 left out, in place, and which rows remain.

    None for all, as where moving rows would cost more than their products. The number of rows has
    to be known to the host, which waits for it.
    """
    active = coefficients.nonzero()[:, 0]
    if active.shape[0] > _WORTH_MOVING * coefficients.shape[0]:
        return dz, None
    return move_to_front(dz, active), active


def scaled_rows(
    hidden: Tensor, coefficients: Tensor, operand: torch.dtype, active: Tensor | None = None
) -> Tensor:
    """``coefficients [a] * hidden[active]`` as a factor of the weight's gradient, rounded once."""
    factor = hidden.new_empty((coefficients.shape[0], hidden.shape[1]), dtype=operand)
    for rows in product_slices(factor) if active is not None else [slice(None)]:
        some = hidden if active is None else hidden[active[rows]]
        torch.mul(some, coefficients[rows, None], out=factor[rows])
    return factor


def write_hidden_gradient(
    dz: Tensor, rows: TargetRows, weight: Tensor, out: Tensor, active: Tensor | None = None
) -> None:
    """``coefficients * (dz weight) + own * weight[targets]``, ``[a, D]``, into all rows of ``out``
    or those ``active``, rounded once; ``weight`` is a factor."""
    few = max(_FEW_BYTES // (4 * out.shape[1]), 1)
    for part in product_slices(out[: dz.shape[0]]):
        result, of = product(dz[part], weight), rows.pick(part)
        places = None if active is None else active[part]
        for some in blocks(result.shape[0], few):
            these = of.pick(some)
            ours = result[some].mul_(these.coefficients[:, None])
            ours.addcmul_(these.own[:, None], weight[these.targets])
            if places is None:
                out[part][some] = ours
            else:
                out.index_copy_(0, places[some], ours.to(out.dtype))
        del result, ours  # before the next ones are made
