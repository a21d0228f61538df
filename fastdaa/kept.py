"""3U with bf16 factors: the gradients of all logits are kept until the backward pass.

For every sequence-level objective ``dL/dz_i = c_i (onehot_i - p_i)``, one number ``c_i`` a row. The
rest of the row needs no loss, so forward makes it while a tile of logits is at hand, and rounds it
to the dtype of the next product: 2 bytes a logit, and no fp32 sum of the weight's gradient. The
numbers join in backward, where the loss's own gradient is known too: on the rows of the hidden
states' gradient, and on the hidden states as a factor of the weight's gradient,

    dH = c * (dz W),    dW = dz^T (c * H).

Each entry of both is rounded once to the dtype of its tensor. In fp16, rounding ``c * H`` costs
more than rounding ``c * dz`` where logits are small, so fp16 is left to chunks of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdaa.head import LmHead
from fastdaa.outputs import TokenStats
from fastdaa.planner import HeadPlan
from fastdaa.score import join
from fastdaa.tiles import Logits, blocks, product, without_autocast

# Products are rounded in slices of so many bytes of fp32, which a GPU's cache holds and whose
# products fill it twice over. A slice is a multiple of 128 rows.
_SLICE_BYTES = 32 << 20
_SLICE_ROWS = 128
# Rows of the buffer begin at multiples of 32 bytes, as products of half-precision factors like it.
_ROW_MULTIPLE = 16


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
        with without_autocast(hidden_states.device):
            unscaled = _unscaled_gradients(logits, targets, plan, stats)
            losses, coefficients = objective(unscaled.logps)
        ctx.save_for_backward(hidden_states, weight, bias, unscaled.dz, coefficients)
        values = join(unscaled.values, 3, coefficients.new_zeros(0))
        ctx.mark_non_differentiable(losses, unscaled.logps, *values)
        return losses.sum() / pairs, losses, unscaled.logps, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Both products; what was saved stays as it is, so that backward can run again."""
        hidden, weight, bias, dz, coefficients = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        rows = coefficients * grad_loss
        with without_autocast(hidden.device):
            # The weight first: its factor is gone before the gradient of the hidden states comes.
            by_weight = _weight_gradient(dz, rows, hidden, weight) if wanted[1] else None
            by_hidden = _hidden_gradient(dz, rows, hidden, weight) if wanted[0] else None
            by_bias = _bias_gradient(dz, rows, bias) if wanted[2] else None
        return by_hidden, by_weight, by_bias, None, None, None, None, None, None


class _Unscaled(NamedTuple):
    dz: Tensor
    """``[N, V]``: ``onehot - p`` times the slope of the logits, in bf16."""
    logps: Tensor
    """``[N]``."""
    values: list[TokenStats]
    """Of each tile, if asked for."""


def _unscaled_gradients(logits: Logits, targets: Tensor, plan: HeadPlan, stats: bool) -> _Unscaled:
    """One computation of the logits, in tiles of whole rows."""
    columns = slice(0, logits.head.width)
    weight = logits.columns(columns)
    tokens = targets.shape[0]
    stride = -(-columns.stop // _ROW_MULTIPLE) * _ROW_MULTIPLE
    dz = weight.new_empty((tokens, stride), dtype=logits.operand)[:, columns]
    logps = weight.new_empty(tokens, dtype=logits.wide)
    ones = torch.ones_like(logps)

    def rows_of(rows: slice) -> TokenStats | None:
        tile = logits.row_tile(logits.rows(rows), weight, columns)
        state, values = tile.statistics(targets[rows], stats, keep=True)
        tile.gradient(state, targets[rows], ones[rows], out=dz[rows])
        logps[rows] = state.logps
        return values

    values = [rows_of(rows) for rows in blocks(tokens, plan.block_rows)]
    return _Unscaled(dz, logps, [v for v in values if v is not None])


def _weight_gradient(dz: Tensor, rows: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """``dz^T (rows * hidden)``, ``[V, D]`` in the dtype of the weight."""
    factor = torch.mul(hidden, rows[:, None], out=torch.empty_like(hidden, dtype=dz.dtype))
    grad = torch.empty_like(weight)
    for columns in _slices(weight):
        grad[columns] = product(dz[:, columns].T, factor)
    return grad


def _hidden_gradient(dz: Tensor, rows: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """``rows * (dz weight)``, ``[N, D]`` in the dtype of the hidden states."""
    factor, grad = weight.to(dz.dtype), torch.empty_like(hidden)
    for r in _slices(hidden):
        torch.mul(product(dz[r], factor), rows[r, None], out=grad[r])
    return grad


def _bias_gradient(dz: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    """``rows dz``, ``[V]`` in the dtype of the bias."""
    grad = torch.empty_like(bias)
    for columns in blocks(bias.shape[0], max(_SLICE_BYTES // (4 * max(dz.shape[0], 1)), 1)):
        grad[columns] = rows @ dz[:, columns].to(rows.dtype)
    return grad


def _slices(result: Tensor) -> Iterator[slice]:
    """Slices of the rows of a product's result."""
    rows = _SLICE_BYTES // (4 * result.shape[1]) // _SLICE_ROWS * _SLICE_ROWS
    return blocks(result.shape[0], max(rows, _SLICE_ROWS))
