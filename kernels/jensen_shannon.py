"""The Jensen-Shannon divergence of two heads, given the normalisers of every row.

The second pass of ``divergence.py``: products and splits are the same, and a term needs nothing of
the other columns any more.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.elementary import exp, log1p
from fastdaa.kernels.logit_tile import (
    _both_products,
    _final_logits,
    _without_padding,
    _work_item,
)

_BLOCK = 128
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["N"])
def _sum_js_kernel(
    hidden,  # [N, D] pointer or descriptor
    weight,  # [V, D] pointer or descriptor
    bias_ptr,  # [V] or None
    ref_hidden,  # [N, ref_D] pointer or descriptor
    ref_weight,  # [V, ref_D] pointer or descriptor
    ref_bias_ptr,  # [V] or None
    rows_ptr,  # [4, N]
    sums_ptr,  # [splits, N] fp32
    N,
    V,
    D,
    ref_D,
    inner,
    outer,
    ref_inner,
    ref_outer,
    SPLIT_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    splits = tl.cdiv(V, SPLIT_V)
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = _work_item(item, row_blocks, splits, GROUP_N)
        offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = offs_n < N
        field = tl.cast(N, tl.int64)
        m = tl.load(rows_ptr + offs_n, mask=inside, other=0.0)
        log_s = tl.load(rows_ptr + field + offs_n, mask=inside, other=0.0)
        ref_m = tl.load(rows_ptr + 2 * field + offs_n, mask=inside, other=0.0)
        ref_log_s = tl.load(rows_ptr + 3 * field + offs_n, mask=inside, other=0.0)
        js = tl.zeros((BLOCK_N,), tl.float32)
        last = tl.minimum((split + 1) * SPLIT_V, V)
        for column in range(split * SPLIT_V, last, BLOCK_V):
            parts, ref_parts = _both_products(
                hidden, weight, ref_hidden, ref_weight, row_block * BLOCK_N, column, N, V, D, ref_D,
                BLOCK_N, BLOCK_V, BLOCK_D, PARTS, EVEN_D, USE_TMA,
            )  # fmt: skip
            for i in tl.static_range(PARTS):
                columns = column + i * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
                z = _final_logits(parts[i], bias_ptr, columns, V, inner, outer)
                ref_z = _final_logits(ref_parts[i], ref_bias_ptr, columns, V, ref_inner, ref_outer)
                z, ref_z = _without_padding(z, columns, V), _without_padding(ref_z, columns, V)
                js += _js_terms(
                    (z - m[:, None]) - log_s[:, None], (ref_z - ref_m[:, None]) - ref_log_s[:, None]
                )
        tl.store(sums_ptr + split.to(tl.int64) * N + offs_n, js, mask=inside)


@triton.jit
def _js_terms(logp, ref_logp):
    """Row sums of ``(p log(p / r) + q log(q / r)) / 2`` with ``r = (p + q) / 2``.

    With x half the difference of the logs, the term is ``((q - p) x - (p + q) log cosh x) / 2``,
    which does not cancel where p and q are close. Beyond |x| = 20 the smaller one is nothing.
    """
    p, q = exp(logp), exp(ref_logp)
    x = tl.minimum(tl.maximum(0.5 * (ref_logp - logp), -20.0), 20.0)
    square, size = x * x, tl.abs(x)
    near = square * (0.5 + square * (-1.0 / 12 + square * (1.0 / 45 + square * (-17.0 / 2520))))
    log_cosh = tl.where(size < 0.25, near, size + log1p(exp(-2.0 * size)) - _LN2)
    terms = 0.5 * ((q - p) * x - (p + q) * log_cosh)
    return tl.sum(tl.where(p + q > 0, terms, 0.0), axis=1)


@triton.jit(do_not_specialize=["N"])
def _sum_splits_kernel(
    sums_ptr,  # [splits, N]
    out_ptr,  # [N]
    N,
    splits,
    BLOCK: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs_n < N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + tl.cast(split, tl.int64) * N + offs_n, mask=inside, other=0.0)
    tl.store(out_ptr + offs_n, total, mask=inside)


def sum_js(
    grid: tuple[int],
    inputs: tuple[Any, ...],
    rows: Tensor,  # [4, N]
    sizes: tuple[Any, ...],
    constants: tuple[Any, ...],
    launch: dict[str, Any],
) -> Tensor:
    """The divergence ``[N]``, with what ``token_divergences`` launched its first pass with."""
    N, splits = rows.shape[1], triton.cdiv(sizes[1], constants[0])
    sums, out = rows.new_empty(splits, N), rows.new_empty(N)
    _sum_js_kernel[grid](*inputs, rows, sums, *sizes, *constants, **launch)
    _sum_splits_kernel[(triton.cdiv(N, _BLOCK),)](
        sums, out, N, splits, _BLOCK, enable_fp_fusion=True
    )
    return out
