"""Rows of hidden states, or of their gradient, times numbers of their tokens, in one read.

A product of gradients of logits that were made without the loss's numbers and without the targets
(``kernels/README.md``) becomes ``factors * product + own * weight[targets]``, rounded once. The
hidden states become a factor of the weight's gradient, dithered (``fastdaa/scaled_rows.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.configs import RowConfig, row_config
from fastdaa.kernels.operands import mark_written, on_device


# Vectors change with the batch, and one value a program is read of each.
@triton.jit(
    do_not_specialize_on_alignment=["factors_ptr", "own_ptr", "targets_ptr", "places_ptr"],
)
def _finish_hidden_rows_kernel(
    product_ptr,  # [rows, D] fp32, or fp16 where factors hold its scale
    factors_ptr,  # [rows] fp32
    own_ptr,  # [rows] fp32
    weight_ptr,  # [V, D]
    targets_ptr,  # [rows] int64
    places_ptr,  # [rows] int64 rows of out, or None for all in their order
    out_ptr,  # [N, D]
    V, D, column_blocks, stride_pn, stride_pd, stride_wv, stride_wd, stride_on, stride_od,
    HAS_PLACES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # One axis of programs: the second one of a grid ends at 65535.
    row = (tl.program_id(0) // column_blocks).to(tl.int64)
    columns = (tl.program_id(0) % column_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < D
    columns = columns.to(tl.int64)  # a transposed weight's columns lie V entries apart
    factor, own = tl.load(factors_ptr + row), tl.load(own_ptr + row)
    target = tl.load(targets_ptr + row)
    valid = (target >= 0) & (target < V)
    target = tl.where(valid, target, 0)
    own = tl.where(valid, own, 0.0)
    product = tl.load(product_ptr + row * stride_pn + columns * stride_pd, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + target * stride_wv + columns * stride_wd, mask=inside, other=0.0)
    total = factor * product + own * weight.to(tl.float32)
    if HAS_PLACES:
        row = tl.load(places_ptr + row)
    out = out_ptr + row * stride_on + columns * stride_od
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["factors_ptr", "sources_ptr"])
def _scale_hidden_rows_kernel(
    hidden_ptr,  # [N, D]
    factors_ptr,  # [rows] fp32
    sources_ptr,  # [rows] int64 rows of hidden, or None for all in their order
    out_ptr,  # [rows, D] bf16, contiguous
    D, column_blocks, stride_hn, stride_hd,
    HAS_SOURCES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // column_blocks).to(tl.int64)
    columns = (tl.program_id(0) % column_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < D
    source = row
    if HAS_SOURCES:
        source = tl.load(sources_ptr + row)
    offsets = source * stride_hn + columns.to(tl.int64) * stride_hd
    hidden = tl.load(hidden_ptr + offsets, mask=inside, other=0.0)
    wide = tl.load(factors_ptr + row) * hidden.to(tl.float32)
    # Of the 16 bits that bf16 leaves out, golden ratio times row.
    dither = ((32768 + 40503 * row) & 0xFFFF).to(tl.int32)
    cut = (wide.to(tl.int32, bitcast=True) + dither) & -65536
    # The bits of a NaN may wrap around.
    rounded = tl.where(wide == wide, cut.to(tl.float32, bitcast=True), wide)
    tl.store(out_ptr + row * D + columns, rounded.to(tl.bfloat16), mask=inside)


def scale_hidden_rows(
    hidden: Tensor,
    factors: Tensor,
    out: Tensor,
    sources: Tensor | None = None,
    *,
    config: RowConfig | None = None,
) -> None:
    """``out = factors * hidden[sources]``, dithered: see :mod:`fastdaa.scaled_rows`.

    Args:
        hidden: ``[N, D]`` bf16, fp16 or fp32, any strides.
        factors: ``[r]`` fp32.
        out: ``[r, D]`` bf16, contiguous.
        sources: ``[r]`` int64 rows of ``hidden``; None for its first ones.
        config: block sizes; None for the table's.
    """
    config = config or row_config("hidden_rows", out.device)
    rows, columns = out.shape
    column_blocks = triton.cdiv(columns, config.block_v)
    if rows * column_blocks == 0:
        return
    with on_device(out):
        _scale_hidden_rows_kernel[(rows * column_blocks,)](
            hidden, factors.contiguous(), None if sources is None else sources.contiguous(), out,
            columns, column_blocks, *hidden.stride(),
            HAS_SOURCES=sources is not None, BLOCK_V=config.block_v,
            num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    mark_written(out)


def finish_hidden_rows(
    product: Tensor,
    factors: Tensor,
    own: Tensor,
    weight: Tensor,
    targets: Tensor,
    out: Tensor,
    places: Tensor | None = None,
    *,
    config: RowConfig | None = None,
) -> None:
    """``out[places] = factors * product + own * weight[targets]``, each entry rounded once.

    Args:
        product: ``[r, D]`` fp32, or fp16 with a scale in the factors, any strides; ``out`` may be
            the same memory, also in another dtype of as many bytes.
        factors, own: ``[r]`` fp32.
        weight: ``[V, D]`` bf16, fp16 or fp32, any strides.
        targets: ``[r]`` int64; those outside ``[0, V)`` add nothing.
        out: ``[N, D]`` of one of these dtypes, any strides.
        places: ``[r]`` int64 different rows of ``out``; None for its first rows.
        config: block sizes; None for the table's.
    """
    config = config or row_config("hidden_rows", out.device)
    rows, columns = product.shape
    column_blocks = triton.cdiv(columns, config.block_v)
    if rows * column_blocks == 0:
        return
    with on_device(out):
        _finish_hidden_rows_kernel[(rows * column_blocks,)](
            product, factors.contiguous(), own.contiguous(), weight, targets.contiguous(),
            None if places is None else places.contiguous(), out,
            *weight.shape, column_blocks, *product.stride(), *weight.stride(), *out.stride(),
            HAS_PLACES=places is not None, BLOCK_V=config.block_v,
            num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    mark_written(out)
