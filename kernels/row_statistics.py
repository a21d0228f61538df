"""Statistics of rows of logits in one pass: log-sum-exp, target log-prob, optional metrics.

One program a row and vocabulary split. Every lane keeps a running maximum and sum of its own
columns, so nothing is exchanged between lanes until the split ends; :mod:`merge_splits` then takes
the splits in their order. A tile may hold whole rows or any number of whole splits of them: the
order of all sums is fixed, and so are the bits. The target is left out of the sums and joins at the
end: where it is the maximum, its 1 would swallow the rest, and a confident token would have a
log-prob of 0. The derivation is in README.md of this folder.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.configs import RowConfig, row_config
from fastdaa.kernels.elementary import LOWEST, exact_sum, exp, floored
from fastdaa.kernels.final_logits import finish_logits, load_products, logit_factors
from fastdaa.kernels.merge_splits import (
    SCORE_FIELDS,
    STATS_FIELDS,
    RowStatistics,
    merge_splits,
)
from fastdaa.kernels.operands import on_device


# The alignment of targets, which are read one value a program, and the number of rows change with
# the batch: a variant of the code for each would be compiled in the middle of training. Launched
# without fused multiply-adds: which of them a compiler forms depends on what else is asked for, and
# the policy, whose gradient is wanted, has to round like the reference.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["targets_ptr"])
def _take_row_states_kernel(
    z_ptr,  # [rows, V]
    bias_ptr,  # [V] or None
    targets_ptr,  # [rows] int64
    states_ptr,  # [splits, fields, rows]
    slopes_ptr,  # [rows, sloped] bf16 or None
    rows, V, first_column, sloped, stride_zn, stride_on,
    inner, outer,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_STATS: tl.constexpr,
    HAS_SLOPES: tl.constexpr, SPLIT_V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    splits = tl.cdiv(V, SPLIT_V)
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits).to(tl.int64)
    z_row = z_ptr + row * stride_zn
    first = split * SPLIT_V
    end = tl.minimum(first + SPLIT_V, V)
    target = tl.load(targets_ptr + row) - first_column
    valid = (target >= 0) & (target < V)
    target = tl.where(valid, target, -1).to(tl.int32)
    own = load_products(z_row, bias_ptr, target, valid, HAS_BIAS)
    own, _ = finish_logits(own, inner, outer, HAS_SOFTCAP)
    here = (target >= first) & (target < end)

    m = tl.full([BLOCK_V], LOWEST, tl.float32)  # running maximum of a lane
    s = tl.zeros([BLOCK_V], tl.float32)  # sum of e = exp(z - m)
    w = tl.zeros([BLOCK_V], tl.float32)  # sum of e (z - m)
    q = tl.zeros([BLOCK_V], tl.float32)  # sum of e^2
    total = tl.zeros([BLOCK_V], tl.float32)  # sum of z
    for start in range(first, end, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < end
        z = load_products(z_row, bias_ptr, columns, inside, HAS_BIAS)
        z, slope = finish_logits(z, inner, outer, HAS_SOFTCAP)
        if HAS_STATS:
            total += tl.where(inside, z, 0.0)
        z = tl.where(inside & (columns != target), z, float("-inf"))
        if HAS_SLOPES:
            # 0 at the target. Infinite or NaN only in rows that are written once more.
            ratio = exp(z - own)
            out = (-ratio * slope).to(slopes_ptr.dtype.element_ty)
            tl.store(slopes_ptr + row * stride_on + columns, out, mask=inside & (columns < sloped))
        # One exponential serves both cases: e of the new logit, or the factor on the old sums.
        above = z > m
        gap = floored(-tl.abs(z - m))
        e = exp(gap)
        if HAS_STATS:
            w = tl.where(above, e * (w + s * gap), w + e * gap)
            q = tl.where(above, q * (e * e) + 1.0, q + e * e)
        s = tl.where(above, s * e + 1.0, s + e)
        m = tl.where(above, z, m)

    # The lanes become one.
    if HAS_STATS:
        # fp64 holds such a sum of fp32 numbers in any order, unless their sizes lie 2^18 apart.
        sum_of_logits = tl.sum(total.to(tl.float64), axis=0).to(tl.float32)
    top = tl.max(m, axis=0)
    gap = floored(m - top)
    e = exp(gap)
    fields: tl.constexpr = 6 if HAS_STATS else 3
    state_ptr = states_ptr + split.to(tl.int64) * fields * rows + row
    field = tl.cast(rows, tl.int64)
    tl.store(state_ptr, tl.where(top == LOWEST, float("-inf"), top))
    tl.store(state_ptr + field, exact_sum(s * e))
    tl.store(state_ptr + 2 * field, tl.where(here, own, float("-inf")))
    if HAS_STATS:
        tl.store(state_ptr + 3 * field, exact_sum(e * (w + s * gap)))
        tl.store(state_ptr + 4 * field, exact_sum(q * (e * e)))
        tl.store(state_ptr + 5 * field, sum_of_logits)


def take_row_states(
    z: Tensor,
    targets: Tensor,
    *,
    first_column: int = 0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    stats: bool = False,
    slopes: Tensor | None = None,
    config: RowConfig | None = None,
) -> Tensor:
    """States of the vocabulary splits in a tile of raw products, read once and not changed.

    Args:
        z: ``[r, c]`` products of hidden states and weight, any floating dtype up to fp32 (fp32
            keeps the accuracy contract), contiguous along c, any row stride.
        targets: ``[r]`` int64 over the whole vocabulary, any stride.
        first_column: of the tile; whole splits of ``config.split_v`` columns lie before it.
        bias: ``[c]`` of the tile's columns, any floating dtype.
        logit_scale: factor on the logits before the cap.
        softcap: cap of the logits, or None.
        temperature: divisor of the logits after the cap.
        stats: for the four metrics, too.
        slopes: ``[r, <= c]`` with contiguous columns; becomes minus every probability over the
            target's, times the slope of the logits, in its dtype, and 0 at the target, of the
            first columns. The tile holds whole rows.
        config: block sizes; None for the table's.

    Returns:
        ``[ceil(c / split_v), fields, r]`` fp32, 3 fields or 6 with ``stats``, for
        :func:`merge_splits`, which takes those of all columns one after the other.

    Raises:
        ValueError: columns that are not contiguous, or none.
    """
    rows, width = z.shape
    if width == 0 or z.stride(1) != 1:
        raise ValueError(
            f"z: expected [r, V > 0] with contiguous columns, got shape {list(z.shape)} with "
            f"strides {list(z.stride())}"
        )
    config = config or row_config("row_statistics", z.device)
    splits = triton.cdiv(width, config.split_v)
    fields = STATS_FIELDS if stats else SCORE_FIELDS
    states = torch.empty((splits, fields, rows), dtype=torch.float32, device=z.device)
    inner, outer = logit_factors(logit_scale, softcap, temperature)
    if rows:
        with on_device(z):
            _take_row_states_kernel[(rows * splits,)](
                z, bias if bias is None else bias.contiguous(), targets.contiguous(),
                states, slopes,
                rows, width, first_column, 0 if slopes is None else slopes.shape[1],
                z.stride(0), 0 if slopes is None else slopes.stride(0),
                inner, outer,
                HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_STATS=stats,
                HAS_SLOPES=slopes is not None, SPLIT_V=config.split_v, BLOCK_V=config.block_v,
                num_warps=config.num_warps, enable_fp_fusion=False,
            )  # fmt: skip
    return states


def splits_of(width: int, device: torch.device) -> int:
    """Vocabulary splits of so many columns on a device."""
    return triton.cdiv(width, row_config("row_statistics", device).split_v)


def take_row_statistics(
    z: Tensor, targets: Tensor, *, stats: bool = False, **options: Any
) -> RowStatistics:
    """Statistics of whole rows ``z [r, V]`` of raw products.

    Arguments are those of :func:`take_row_states`; a target outside ``[0, V)`` gives NaN.
    """
    states = take_row_states(z, targets, stats=stats, **options)
    return merge_splits(states, targets, z.shape[1])
