"""4U: any loss on a trained head. Backward computes the logits again, vocabulary-major.

Every slice of the weight's gradient is summed over all tokens at once and written once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdaa.engines import RowState
from fastdaa.head import LmHead
from fastdaa.planner import HeadPlan
from fastdaa.score import score
from fastdaa.tiles import (
    GradientFactor,
    Logits,
    blocks,
    operand_dtype,
    product,
    product_slices,
    sum_over_shards,
    without_autocast,
)


class Recompute(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, targets, head, plan, stats)`` to log-probs ``[N]``.

    Beside them, without gradient, the three token statistics (empty unless ``stats``). ``head``
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
        more = list(values) if values is not None else [absent.clone() for _ in range(3)]
        ctx.mark_non_differentiable(*more)
        return state.logps, *more

    @staticmethod
    @once_differentiable
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


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden states, weight and bias; None where not wanted."""


def rounded(sums: Gradients, tensors: tuple[Tensor, Tensor, Tensor | None]) -> Gradients:
    """The sums in the dtypes of their tensors."""
    return tuple(  # type: ignore[return-value]
        total if total is None or t is None else total.to(t.dtype)
        for total, t in zip(sums, tensors, strict=True)
    )


def head_gradients(
    logits: Logits,
    targets: Tensor,
    coefficients: Tensor,
    rows: RowState,
    plan: HeadPlan,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of ``sum(coefficients * logps)`` by hidden states, weight and bias.

    A slice of the weight's gradient is summed wide over all tokens, rounded and written once: no
    wide ``[V, D]`` exists.
    """
    head, hidden_states = logits.head, logits.hidden_states
    if plan.sparse:
        active = coefficients.nonzero()[:, 0]
        if active.shape[0] < coefficients.shape[0]:
            by_hidden, weight, bias = head_gradients(
                logits.pick(active), targets[active], coefficients[active], rows.pick(active),
                replace(plan, sparse=False), wanted,
            )  # fmt: skip
            return _among(hidden_states, active, by_hidden), weight, bias
    weight, bias = (
        torch.empty_like(t) if t is not None and want else None
        for t, want in zip((head.weight, head.bias), wanted[1:], strict=True)
    )
    by_hidden = torch.zeros_like(hidden_states, dtype=logits.wide) if wanted[0] else None
    with without_autocast(hidden_states.device):
        call = _Backward(logits, targets, coefficients, rows, plan)
        for columns in blocks(head.width, plan.tile_columns):
            call.add_slice(columns, by_hidden, weight, bias)
    if by_hidden is not None:
        sum_over_shards(by_hidden, head)
        by_hidden = by_hidden.to(hidden_states.dtype)
    return by_hidden, weight, bias


class _Backward:
    """A backward pass, a slice of the vocabulary at a time."""

    def __init__(
        self, logits: Logits, targets: Tensor, coefficients: Tensor, rows: RowState, plan: HeadPlan
    ):
        self.logits, self.targets, self.rows, self.plan = logits, targets, rows, plan
        self.factor = GradientFactor(logits, coefficients)
        self.scaled = self.factor.scaled(coefficients)

    def add_slice(
        self, columns: slice, by_hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """Adds to the wide gradient of the hidden states; writes a slice of the others."""
        operand = self.logits.columns(columns)
        sums = [_slice_sum(t, columns, self.logits.wide) for t in (weight, bias)]
        grads = HeadGradients(self.logits, by_hidden, *sums)
        for r in blocks(self.targets.shape[0], self.plan.tile_rows):
            self._add_tile(r, columns, operand, grads)
        for whole, part in zip((weight, bias), sums, strict=True):
            if whole is not None and part is not None and part.dtype != whole.dtype:
                whole[columns] = part

    def _add_tile(self, r: slice, columns: slice, operand: Tensor, grads: HeadGradients) -> None:
        hidden = self.logits.rows(r)
        tile = self.logits.row_tile(hidden, operand, columns)
        dz = tile.gradient(self.rows.pick(r), self.targets[r], self.scaled[r])
        grads.add(dz, self.factor, hidden, operand, r, slice(0, operand.shape[0]))


def _among(like: Tensor, active: Tensor, rows: Tensor | None) -> Tensor | None:
    """Gradients of the rows ``active`` of a tensor among those that have none."""
    if rows is None:
        return None
    return torch.zeros_like(like, dtype=rows.dtype).index_copy_(0, active, rows)


def _slice_sum(whole: Tensor | None, columns: slice, wide: torch.dtype) -> Tensor | None:
    """Zeros to sum a slice of a gradient in: its own memory where that is wide enough."""
    if whole is None:
        return None
    part = whole[columns]
    return part.zero_() if part.dtype == wide else torch.zeros_like(part, dtype=wide)


class HeadGradients:
    """Wide sums of the gradients of hidden states, weight and bias; None where not wanted."""

    def __init__(
        self, logits: Logits, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ):
        self.head, self.column_sums = logits.head, logits.engine.column_sums
        self.hidden, self.weight, self.bias = hidden, weight, bias

    @classmethod
    def zeros(cls, logits: Logits, wanted: tuple[bool, bool, bool]) -> HeadGradients:
        """Sums of the size of the tensors."""
        tensors = (logits.hidden_states, logits.head.weight, logits.head.bias)
        sums = (
            torch.zeros_like(t, dtype=logits.wide) if want and t is not None else None
            for t, want in zip(tensors, wanted, strict=True)
        )
        return cls(logits, *sums)

    def add(
        self,
        dz: Tensor,
        factor: GradientFactor,
        hidden: Tensor,
        weight: Tensor,
        rows: slice | Tensor,
        columns: slice,
    ) -> None:
        """Add what a gradient tile ``dz [r, c]`` made with scaled coefficients contributes."""
        if self.bias is not None:
            self.bias[columns] += factor.restore(self.column_sums(dz))
        tile = dz.to(factor.operand)
        if self.hidden is not None:
            if isinstance(rows, slice):
                factor.accumulate(self.hidden[rows], tile, weight)
            else:
                for part in product_slices(self.hidden[: tile.shape[0]]):
                    self.hidden[rows[part]] = factor.restore(product(tile[part], weight))
        if self.weight is not None:
            factor.accumulate(self.weight[columns], tile.T, hidden)

    def finish(self) -> Gradients:
        """After the last tile: what other processes' parts of the vocabulary contribute."""
        if self.hidden is not None:
            sum_over_shards(self.hidden, self.head)
        return self.hidden, self.weight, self.bias
