"""Rows of hidden states, times numbers, added to the weight's rows of their targets.

Rows come sorted by target. The program of a target's first row sums all of its rows in fp32, in
their order, and is the only one that adds to the weight's row: no atomics, and one rounding. A
token that makes a part of a text, a comma or a line break, is one long sum: eight rows are read at
a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.configs import RowConfig, row_config
from fastdaa.kernels.operands import mark_written, on_device


# Vectors change with the batch, and are read a few values at a time.
@triton.jit(
    do_not_specialize_on_alignment=[
        "targets_ptr", "ends_ptr", "sources_ptr", "factors_ptr", "less_sources_ptr",
        "less_factors_ptr",
    ],
)  # fmt: skip
def _add_target_rows_kernel(
    out_ptr,  # [V, D]
    hidden_ptr,  # [N, D]
    targets_ptr,  # [rows] int64, ascending
    ends_ptr,  # [rows] int64: where the target's rows end
    sources_ptr,  # [rows] int64 rows of hidden
    factors_ptr,  # [rows] fp32
    less_ptr,  # [M, D], contiguous, or None, as the next two
    less_sources_ptr,  # [rows] int64 rows of less
    less_factors_ptr,  # [rows] fp32
    V, D, column_blocks, stride_ov, stride_od, stride_hn, stride_hd,
    HAS_LESS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # One axis of programs: the second one of a grid ends at 65535.
    first = tl.program_id(0) // column_blocks
    columns = (tl.program_id(0) % column_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < D
    columns = columns.to(tl.int64)  # a transposed weight's columns lie V entries apart
    target = tl.load(targets_ptr + first)
    before = tl.load(targets_ptr + first - 1, mask=first > 0, other=-1)
    # A target outside the vocabulary has no row.
    if (target != before) & (target >= 0) & (target < V):
        end = tl.load(ends_ptr + first).to(tl.int32)
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start in range(first, end, BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            source = tl.load(sources_ptr + at, mask=at < end, other=0)
            factor = tl.load(factors_ptr + at, mask=at < end, other=0.0)
            offsets = source[:, None] * stride_hn + columns[None, :] * stride_hd
            mask = (at < end)[:, None] & inside[None, :]
            hidden = tl.load(hidden_ptr + offsets, mask=mask, other=0.0)
            part = factor[:, None] * hidden.to(tl.float32)
            if HAS_LESS:
                source = tl.load(less_sources_ptr + at, mask=at < end, other=0)
                factor = tl.load(less_factors_ptr + at, mask=at < end, other=0.0)
                offsets = source[:, None] * D + columns[None, :]
                less = tl.load(less_ptr + offsets, mask=mask, other=0.0)
                part -= factor[:, None] * less.to(tl.float32)
            acc += part
        out = out_ptr + target * stride_ov + columns * stride_od
        total = tl.load(out, mask=inside, other=0.0).to(tl.float32) + tl.sum(acc, axis=0)
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def add_sorted_rows(
    out: Tensor,
    hidden: Tensor,
    targets: Tensor,
    sources: Tensor,
    factors: Tensor,
    less: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    config: RowConfig | None = None,
) -> None:
    """``out[targets] += factors * hidden[sources]``, the rows of a target summed in their order.

    Args:
        out: ``[V, D]`` bf16, fp16 or fp32, any strides; each of its entries is rounded once.
        hidden: ``[N, D]`` of any of these dtypes, any strides.
        targets: ``[a]`` int64, ascending; those outside ``[0, V)`` are left out.
        sources: ``[a]`` int64 rows of ``hidden``.
        factors: ``[a]`` fp32.
        less: rows ``[M, D]``, contiguous, sources and factors, as above, of what is subtracted
            before anything is rounded; None for nothing.
        config: block sizes; None for the table's.
    """
    config = config or row_config("target_rows", out.device)
    rows, columns = targets.shape[0], out.shape[1]
    column_blocks = triton.cdiv(columns, config.block_v)
    if rows * column_blocks == 0:
        return
    targets = targets.contiguous()
    others = (None, None, None) if less is None else tuple(t.contiguous() for t in less)
    ends = torch.searchsorted(targets, targets, right=True)
    with on_device(out):
        _add_target_rows_kernel[(rows * column_blocks,)](
            out, hidden, targets, ends, sources.contiguous(), factors.contiguous(), *others,
            *out.shape, column_blocks, *out.stride(), *hidden.stride(),
            HAS_LESS=less is not None, BLOCK_N=config.block_n, BLOCK_V=config.block_v,
            num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    mark_written(out)
