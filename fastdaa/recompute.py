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
        sums = wide_head_gradients(
            Logits(hidden_states, head, ctx.operand, ctx.plan.engine),
            targets,
            coefficients,
            RowState(*rows),
            ctx.plan,
            ctx.needs_input_grad[:3],
        )
        tensors = (hidden_states, weight, bias)
        return *rounded(sums, tensors), None, None, None, None


WideGradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden states, weight and bias; None where not wanted."""


def rounded(sums: WideGradients, tensors: tuple[Tensor, Tensor, Tensor | None]) -> WideGradients:
    """The sums in the dtypes of their tensors."""
    return tuple(  # type: ignore[return-value]
        total if total is None or t is None else total.to(t.dtype)
        for total, t in zip(sums, tensors, strict=True)
    )


def wide_head_gradients(
    logits: Logits,
    targets: Tensor,
    coefficients: Tensor,
    rows: RowState,
    plan: HeadPlan,
    wanted: tuple[bool, bool, bool],
) -> WideGradients:
    """Gradients of ``sum(coefficients * logps)`` by hidden states, weight and bias."""
    head, hidden_states = logits.head, logits.hidden_states
    grads = HeadGradients(logits, wanted)
    factor = GradientFactor(logits, coefficients)
    scaled = factor.scaled(coefficients)
    with without_autocast(hidden_states.device):
        for columns in blocks(head.width, plan.tile_columns):
            weight = logits.columns(columns)
            for r in blocks(hidden_states.shape[0], plan.tile_rows):
                hidden = logits.rows(r)
                tile = logits.row_tile(hidden, weight, columns)
                state = RowState(rows.m[r], rows.log_s[r], rows.logps[r])
                dz = tile.gradient(state, targets[r], scaled[r])
                grads.add(dz, factor, hidden, weight, r, columns)
    return grads.finish()


class HeadGradients:
    """Sums of the gradients of hidden states, weight and bias, wide until the end."""

    def __init__(self, logits: Logits, wanted: tuple[bool, bool, bool]):
        self.head, self.column_sums = logits.head, logits.engine.column_sums
        head = self.head
        tensors = (logits.hidden_states, head.weight, head.bias)
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(t, dtype=logits.wide) if want and t is not None else None
            for t, want in zip(tensors, wanted, strict=True)
        )

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
                self.hidden[rows] = factor.restore(product(tile, weight))
        if self.weight is not None:
            factor.accumulate(self.weight[columns], tile.T, hidden)

    def finish(self) -> WideGradients:
        """After the last tile: what other processes' parts of the vocabulary contribute."""
        if self.hidden is not None:
            sum_over_shards(self.hidden, self.head)
        return self.hidden, self.weight, self.bias
