"""2U: a head that is not trained. Forward makes the gradient of the hidden states, unscaled.

``d logp_i / d h_i`` does not depend on the loss, so it can be made while the logits are at hand;
backward multiplies its rows by whatever coefficient the loss turns out to have
(:mod:`fastdaa.waiting_rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.call_size import packs
from fastdaa.first_order import first_order
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.outputs import STATISTICS, TokenStats
from fastdaa.score import join
from fastdaa.target_rows import TargetRows, finish_hidden
from fastdaa.tiles import Logits, blocks, product, sum_over_shards, without_autocast
from fastdaa.waiting_rows import WaitingRows


class Frozen(torch.autograd.Function):
    """``apply(hidden_states, head, targets [N], plan, stats, positions)`` to log-probs ``[N]``.

    Beside them, without gradient, the token statistics (empty unless ``stats``). Hidden states are
    ``[N, D]``, or ``[P, D]`` with ``positions [N]``.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, head: LmHead, targets: Tensor, plan: HeadPlan, stats: bool,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """One pass over the vocabulary; keeps one ``[N, D]``."""
        logps, slopes, values = logps_and_slopes(
            hidden_states, head, targets, plan, stats=stats, positions=positions
        )
        ctx.save_for_backward(positions, *slopes)
        ctx.dtype, ctx.count = hidden_states.dtype, hidden_states.shape[0]
        ctx.mark_non_differentiable(*values)
        return logps, *values

    @staticmethod
    @first_order
    def backward(ctx: Any, coefficients: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """A row scale."""
        positions, *fields = ctx.saved_tensors
        slopes = WaitingRows(*fields)
        if positions is None:
            grad = slopes.scaled(coefficients, ctx.dtype)
        else:
            grad = slopes.scattered(coefficients, ctx.dtype, positions, ctx.count)
        return grad, None, None, None, None, None


def logps_and_slopes(
    hidden_states: Tensor,
    head: LmHead,
    targets: Tensor,
    plan: HeadPlan,
    operand: torch.dtype | None = None,
    stats: bool = False,
    positions: Tensor | None = None,
) -> tuple[Tensor, WaitingRows, list[Tensor]]:
    """Log-probs ``[N]``, ``d logp / d hidden [N, D]`` and statistics ``[N]``."""
    logits = Logits(hidden_states, head, operand, engine=plan.engine, positions=positions)
    slopes = slopes_of(logits)
    with without_autocast(hidden_states.device):
        logps = torch.empty_like(slopes.scales)
        values: list[TokenStats] = []
        weight = logits.columns(slice(0, head.width))
        for rows in blocks(logits.tokens, plan.block_rows):
            logps[rows], more = _rows(logits, weight, targets[rows], rows, stats, slopes)
            values += [more] if more is not None else []
    return logps, slopes, join(values, STATISTICS, logps.new_empty(0))


def slopes_of(logits: Logits) -> WaitingRows:
    """Memory for slopes ``[N, D]`` of results by the hidden states."""
    hidden = logits.hidden_states
    packed = packs(hidden.dtype)
    return WaitingRows.empty(hidden, logits.wide, packed=packed, rows=logits.tokens)


def _rows(
    logits: Logits, weight: Tensor, targets: Tensor, rows: slice, stats: bool, slopes: WaitingRows
) -> tuple[Tensor, TokenStats | None]:
    """Log-probs, statistics, and slopes ``(1 - p_t) w_t - sum over the others of p_v w_v``, times
    the slope of the logits."""
    tile = logits.row_tile(logits.rows(rows), weight, slice(0, logits.head.width))
    state, values, dz, factors, own = tile.slopes(targets, stats)
    del tile  # before its product comes
    factor = dz.to(logits.operand)
    del dz
    out = product(factor, weight, slopes.place(rows))
    del factor  # before the targets' rows of the weight come
    rows_of, first = TargetRows(targets, factors, own), logits.head.first_token
    if logits.head.shard is not None:
        rows_of = rows_of.among(slice(first, first + weight.shape[0]))
    finish_hidden(out, rows_of, weight, engine=logits.engine_name)
    sum_over_shards(out, logits.head)
    slopes.keep(rows, out)
    return state.logps, values
