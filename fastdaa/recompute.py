"""4U: any loss on a trained head. Backward computes the logits again, vocabulary-major.

Every slice of the weight's gradient is summed over all tokens at once and written once. The
gradient of the hidden states, which every slice adds to, is a wide ``[N, D]`` until the last one.
Where memory does not hold that, or no slice is wanted, it is made a block of rows at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdaa.engines import RowTile
from fastdaa.first_order import first_order
from fastdaa.gradient_sums import Gradients
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.kept_products import FirstColumns, KeptGradients
from fastdaa.outputs import STATISTICS
from fastdaa.row_passes import RowState
from fastdaa.score import score
from fastdaa.tiles import (
    GradientFactor,
    Logits,
    blocks,
    operand_dtype,
    sum_over_shards,
    without_autocast,
)


class Recompute(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, targets, head, plan, stats)`` to log-probs ``[N]``.

    Beside them, without gradient, the token statistics (empty unless ``stats``). ``head``
    carries the options; its tensors are replaced by ``weight`` and ``bias``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: LmHead,
        plan: HeadPlan,
        stats: bool,
    ) -> tuple[Tensor, ...]:
        """Statistics only; the inputs and three numbers a token are kept."""
        state, values = score(hidden_states, head, targets, plan, stats=stats)
        ctx.save_for_backward(hidden_states, weight, bias, targets, *state)
        ctx.plan = plan
        ctx.options = replace(head, weight=head.weight[:0], bias=None)
        ctx.operand = operand_dtype(hidden_states, weight)
        absent = state.m.new_empty(0)
        more = list(values) if values is not None else [absent.clone() for _ in range(STATISTICS)]
        ctx.mark_non_differentiable(*more)
        return state.logps.clone(), *more  # the caller may change it, backward reads the other

    @staticmethod
    @first_order
    def backward(ctx: Any, coefficients: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states, the weight and the bias, those that are wanted."""
        hidden_states, weight, bias, targets, *rows = ctx.saved_tensors
        head = replace(ctx.options, weight=weight, bias=bias)
        grads = head_gradients(
            Logits(hidden_states, head, ctx.operand, ctx.plan.engine),
            targets,
            coefficients,
            RowState(*rows),
            ctx.plan,
            ctx.needs_input_grad[:3],
        )
        return *grads, None, None, None, None


def head_gradients(
    logits: Logits,
    targets: Tensor,
    coefficients: Tensor,
    rows: RowState,
    plan: HeadPlan,
    wanted: tuple[bool, bool, bool],
    entropy: Tensor | None = None,
    kept: KeptGradients | None = None,
) -> Gradients:
    """Gradients of ``sum(coefficients * logps)`` by hidden states, weight and bias; those of
    ``sum(coefficients * entropy)`` where ``entropy [N]`` is given.

    A slice of the weight's gradient is one product over all tokens, or a wide sum of several, and
    rounded and written once: no wide ``[V, D]`` exists.

    Args:
        kept: gradients of the logits of the first columns, which are not computed again.
    """
    head, hidden_states = logits.head, logits.hidden_states
    active = None
    if kept is not None:
        active = kept.active
    elif plan.sparse:
        active = _active(coefficients)
    if active is not None:
        by_hidden, weight, bias = head_gradients(
            logits.pick(active), targets[active], coefficients[active], rows.pick(active),
            replace(plan, sparse=False), wanted, None if entropy is None else entropy[active],
            None if kept is None else kept.of_active(),
        )  # fmt: skip
        return _among(hidden_states, active, by_hidden), weight, bias
    made = torch.empty_like if targets.shape[0] else torch.zeros_like  # without products
    weight, bias = (
        made(t) if t is not None and want else None
        for t, want in zip((head.weight, head.bias), wanted[1:], strict=True)
    )
    with without_autocast(hidden_states.device):
        first = None
        if kept is not None:
            first = FirstColumns(kept, targets, coefficients, head.width, plan.engine)
        if first is not None:
            first.write_head(hidden_states, weight, bias)
        call = _Backward(logits, targets, coefficients, rows, plan, entropy)
        summed = wanted[0] and not plan.hidden_rows
        by_hidden = torch.empty_like(hidden_states, dtype=logits.wide) if summed else None
        if first is not None and by_hidden is not None:
            first.write_hidden(head.weight, by_hidden)
        start = 0 if first is None else first.width
        if by_hidden is not None or weight is not None or bias is not None:
            for part in blocks(head.width - start, plan.tile_columns):
                columns = slice(start + part.start, start + part.stop)
                call.add_slice(columns, by_hidden, weight, bias)
        if by_hidden is not None:
            sum_over_shards(by_hidden, head)
            by_hidden = by_hidden.to(hidden_states.dtype)
        elif wanted[0]:
            by_hidden = call.hidden_by_rows(plan.hidden_rows, plan.hidden_columns)
    return by_hidden, weight, bias


class _Backward:
    """A backward pass, a slice of the vocabulary at a time."""

    def __init__(
        self, logits: Logits, targets: Tensor, coefficients: Tensor, rows: RowState, plan: HeadPlan,
        entropy: Tensor | None,
    ):  # fmt: skip
        self.logits, self.targets, self.rows, self.entropy = logits, targets, rows, entropy
        self.factor = GradientFactor(logits, coefficients)
        self.scaled = self.factor.scaled(coefficients)
        self.parts = list(blocks(targets.shape[0], plan.tile_rows))

    def add_slice(
        self, columns: slice, by_hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """Adds to the wide gradient of the hidden states; writes a slice of the others."""
        operand, wide = self.logits.columns(columns), self.logits.wide
        by_weight = None if weight is None else weight[columns]
        by_bias = None if bias is None else torch.zeros_like(bias[columns], dtype=wide)
        total = by_weight
        if by_weight is not None and by_weight.dtype != wide and len(self.parts) > 1:
            total = torch.empty_like(by_weight, dtype=wide)  # one product rounds its own results
        for r in self.parts:
            hidden = self.logits.rows(r)
            tile = self.logits.tile_again(hidden, operand, columns)
            dz = self._gradient(tile, r)
            if by_bias is not None:
                by_bias += self.factor.restore(tile.column_sums(dz))
            dz = dz.to(self.factor.operand)
            if by_hidden is not None:
                self._put(by_hidden[r], dz, operand, first=columns.start == 0)
            if total is not None:
                self._put(total, dz.T, hidden, first=r.start == 0)
            del tile, dz  # before the next ones are made
        if by_weight is not None and total is not None and total is not by_weight:
            by_weight.copy_(total)
        if bias is not None and by_bias is not None:
            bias[columns] = by_bias

    def hidden_by_rows(self, block_rows: int, width: int) -> Tensor:
        """The gradient of the hidden states: the wide sum of a block of rows at a time, each
        rounded once."""
        grad = torch.empty_like(self.logits.hidden_states)
        for rows in blocks(grad.shape[0], block_rows):
            hidden = self.logits.rows(rows)
            total = torch.empty_like(grad[rows], dtype=self.logits.wide)
            for columns in blocks(self.logits.head.width, width):
                operand = self.logits.columns(columns)
                dz = self._gradient(self.logits.tile_again(hidden, operand, columns), rows)
                dz = dz.to(self.factor.operand)
                self._put(total, dz, operand, first=columns.start == 0)
                del dz, operand  # before the next ones are made
            sum_over_shards(total, self.logits.head)
            grad[rows] = total
        return grad

    def _gradient(self, tile: RowTile, rows: slice) -> Tensor:
        state, scaled = self.rows.pick(rows), self.scaled[rows]
        if self.entropy is not None:
            return tile.entropy_gradient(state, self.entropy[rows], scaled)
        return tile.gradient(state, self.targets[rows], scaled)

    def _put(self, total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        """``a @ b``, a product with a tile, into a sum or where nothing is yet."""
        (self.factor.write if first else self.factor.accumulate)(total, a, b)


def _active(coefficients: Tensor) -> Tensor | None:
    """Tokens with a coefficient, None for all."""
    active = coefficients.nonzero()[:, 0]
    return active if active.shape[0] < coefficients.shape[0] else None


def _among(like: Tensor, active: Tensor, rows: Tensor | None) -> Tensor | None:
    """Gradients of the rows ``active`` of a tensor among those that have none."""
    if rows is None:
        return None
    return torch.zeros_like(like, dtype=rows.dtype).index_copy_(0, active, rows)
