"""2U: a head that is not trained. Forward makes the gradient of the hidden states, unscaled.

``d logp_i / d h_i`` does not depend on the loss, so it can be made while the logits are at hand;
backward multiplies its rows by whatever coefficient the loss turns out to have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.first_order import first_order
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.outputs import STATISTICS, TokenStats
from fastdaa.row_passes import in_tile
from fastdaa.score import join
from fastdaa.target_rows import TargetRows, finish_hidden
from fastdaa.tiles import Logits, blocks, product, sum_over_shards, without_autocast


class Frozen(torch.autograd.Function):
    """``apply(hidden_states [N, D], head, targets [N], plan, stats)`` to log-probs ``[N]``.

    Beside them, without gradient, the token statistics (empty unless ``stats``).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, head: LmHead, targets: Tensor, plan: HeadPlan, stats: bool
    ) -> tuple[Tensor, ...]:
        """One pass over the vocabulary; keeps one ``[N, D]`` in the wide dtype."""
        logps, slopes, values = logps_and_slopes(hidden_states, head, targets, plan, stats=stats)
        ctx.save_for_backward(slopes)
        ctx.dtype = hidden_states.dtype
        ctx.mark_non_differentiable(*values)
        return logps, *values

    @staticmethod
    @first_order
    def backward(ctx: Any, coefficients: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """A row scale."""
        (slopes,) = ctx.saved_tensors
        return scaled_slopes(slopes, coefficients, ctx.dtype), None, None, None, None


def scaled_slopes(slopes: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the hidden states, ``[N, D]``, rounded once."""
    # Into the dtype of the result at once: a product of its own would be a second [N, D].
    grad = torch.empty_like(slopes, dtype=dtype)
    return torch.mul(slopes, coefficients[:, None], out=grad)


def logps_and_slopes(
    hidden_states: Tensor,
    head: LmHead,
    targets: Tensor,
    plan: HeadPlan,
    operand: torch.dtype | None = None,
    stats: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probs ``[N]``, ``d logp / d hidden [N, D]`` and statistics ``[N]``, all wide."""
    logits = Logits(hidden_states, head, operand, engine=plan.engine)
    with without_autocast(hidden_states.device):
        slopes = hidden_states.new_empty(hidden_states.shape, dtype=logits.wide)
        logps = slopes.new_empty(slopes.shape[0])
        values: list[TokenStats] = []
        weight = logits.columns(slice(0, head.width))
        for rows in blocks(hidden_states.shape[0], plan.block_rows):
            logps[rows], more = _rows(logits, weight, targets[rows], rows, stats, slopes[rows])
            values += [more] if more is not None else []
        sum_over_shards(slopes, head)
    return logps, slopes, join(values, STATISTICS, logps.new_empty(0))


def _rows(
    logits: Logits, weight: Tensor, targets: Tensor, rows: slice, stats: bool, out: Tensor
) -> tuple[Tensor, TokenStats | None]:
    """Log-probs, statistics, and into ``out`` ``(1 - p_t) w_t - sum over the others of p_v w_v``,
    times the slope of the logits."""
    tile = logits.row_tile(logits.rows(rows), weight, slice(0, logits.head.width))
    state, values, slopes, factors, own = tile.slopes(targets, stats)
    product(slopes.to(logits.operand), weight, out)
    del tile, slopes  # before the targets' rows of the weight come
    inside, local = in_tile(targets, logits.head.first_token, weight.shape[0])
    rows_of = TargetRows(local, factors, torch.where(inside, own, 0.0))
    finish_hidden(out, rows_of, weight, engine=logits.engine_name)
    return state.logps, values
