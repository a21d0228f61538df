"""The state of a row from those of its vocabulary splits, and its log-probability and metrics.

Splits are merged in their order, and the target, which none of them has counted, joins last. Where
the splits come from, tiles of logits (``row_statistics``) or a product's accumulator (``score``),
makes no difference.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.elementary import FLOOR, exp, log1p
from fastdaa.kernels.logit_tile import _finite, _shift
from fastdaa.kernels.operands import on_device

SCORE_FIELDS, STATS_FIELDS = 3, 6
"""Numbers in the state of a row and split: maximum, sum of ``exp(z - m)`` and target logit; with
statistics, sums of ``exp(z - m) (z - m)``, of ``exp(z - m)^2`` and of the logits, too."""

_BLOCK = 128


class RowStatistics(NamedTuple):
    """Everything is ``[N]`` and fp32; the last four are None unless statistics were asked for."""

    m: Tensor
    """Largest logit of the row, or 0 in a row of ``-inf``."""
    log_s: Tensor
    """Log of the sum of ``exp(z - m)``: the log-sum-exp is ``m + log_s``."""
    logps: Tensor
    """Log-probability of the target, in nats; NaN for a target outside ``[0, V)``."""
    target_logit: Tensor
    entropy: Tensor | None = None
    """In nats."""
    top1: Tensor | None = None
    """1 where no other token is more probable than the target, else 0."""
    mean_logit: Tensor | None = None
    log_sum_sq: Tensor | None = None
    """Log of the sum of the squared probabilities, in nats."""


# Launched without fused multiply-adds, so that its two variants round alike.
@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["targets_ptr"])
def _merge_splits_kernel(
    states_ptr,  # [splits, fields, N] fp32
    targets_ptr,  # [N] int64
    out_ptr,  # [4, N] fp32, [8, N] with STATS
    N,
    V,
    splits,
    BLOCK: tl.constexpr,
    STATS: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs_n < N
    field = tl.cast(N, tl.int64)
    m = tl.full((BLOCK,), -float("inf"), tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    target = tl.full((BLOCK,), -float("inf"), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    in_ptrs = states_ptr + offs_n
    for _ in range(splits):
        split_m = tl.load(in_ptrs, mask=inside, other=0.0)
        split_s = tl.load(in_ptrs + field, mask=inside, other=1.0)
        split_target = tl.load(in_ptrs + 2 * field, mask=inside, other=0.0)
        target = tl.where(split_target == -float("inf"), target, split_target)
        new_m = tl.maximum(m, split_m)
        d, split_d = _shift(m, new_m), _shift(split_m, new_m)
        scale, split_scale = exp(d), exp(split_d)
        if STATS:
            split_weighted = tl.load(in_ptrs + 3 * field, mask=inside, other=0.0)
            split_squares = tl.load(in_ptrs + 4 * field, mask=inside, other=0.0)
            total += tl.load(in_ptrs + 5 * field, mask=inside, other=0.0)
            weighted = scale * (weighted + d * s)
            weighted += split_scale * (split_weighted + split_d * split_s)
            squares = scale * scale * squares + split_scale * split_scale * split_squares
        s = scale * s + split_scale * split_s
        m = new_m
        in_ptrs += (6 if STATS else 3) * field
    wanted = tl.load(targets_ptr + offs_n, mask=inside, other=0)
    target = tl.where((wanted >= 0) & (wanted < V), target, float("nan"))
    # The target joins the others: they shift by d, and own = exp(y) of the target.
    top = _finite(tl.maximum(m, target))
    d = _shift(m, top)
    y = target - top
    own = exp(y)
    rest = exp(d) * s
    log_s = tl.where(y == 0.0, log1p(rest), tl.log(rest + own))
    out_ptrs = out_ptr + offs_n
    tl.store(out_ptrs, top, mask=inside)
    tl.store(out_ptrs + field, log_s, mask=inside)
    tl.store(out_ptrs + 2 * field, y - log_s, mask=inside)
    tl.store(out_ptrs + 3 * field, target, mask=inside)
    if STATS:
        norm = exp(-log_s)
        weighted = exp(d) * (weighted + d * s) + tl.maximum(y, FLOOR) * own
        squares = exp(2.0 * d) * squares + own * own
        tl.store(out_ptrs + 4 * field, log_s - weighted * norm, mask=inside)
        tl.store(out_ptrs + 5 * field, (target >= m).to(tl.float32), mask=inside)
        tl.store(out_ptrs + 6 * field, total / V, mask=inside)
        tl.store(out_ptrs + 7 * field, tl.log(squares) - 2.0 * log_s, mask=inside)


def merge_splits(states: Tensor, targets: Tensor, vocab_size: int) -> RowStatistics:
    """Statistics of rows from the states of all their splits.

    Args:
        states: ``[splits, fields, N]`` fp32, in the order of the vocabulary, contiguous; 6 fields
            for all statistics, 3 for the first four.
        targets: ``[N]`` int64, any stride.
        vocab_size: ``V``.
    """
    splits, fields, rows = states.shape
    stats = fields == STATS_FIELDS
    out = states.new_empty((8 if stats else 4, rows))
    if rows:
        with on_device(states):
            _merge_splits_kernel[(triton.cdiv(rows, _BLOCK),)](
                states, targets.contiguous(), out, rows, vocab_size, splits, _BLOCK, stats,
                enable_fp_fusion=False,
            )  # fmt: skip
    return RowStatistics(*out.unbind())
