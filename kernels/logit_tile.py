"""Tiles of logits in registers: the product, and what the head does to it. For kernels only."""

from __future__ import annotations

import triton
import triton.language as tl

from fastdaa.kernels.elementary import FLOOR
from fastdaa.kernels.final_logits import finish_logits


@triton.jit
def _product(
    hidden,  # [N, D] pointer, or a tensor descriptor with blocks [BLOCK_N, BLOCK_D]
    weight,  # [V, D] pointer, or a tensor descriptor with blocks [BLOCK_V, BLOCK_D]
    row,
    column,
    N,
    V,
    D,
    stride_hn,
    stride_wv,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """``hidden[row:] @ weight[column:].T`` in fp32, ``[BLOCK_N, BLOCK_V]``.

    Entries beyond N or V are not meaningful; descriptors read zeros there, pointers the last row.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if USE_TMA:
        for d in range(0, D, BLOCK_D):
            hidden_tile = hidden.load([row, d])  # [BLOCK_N, BLOCK_D]
            weight_tile = weight.load([column, d])  # [BLOCK_V, BLOCK_D]
            acc = tl.dot(hidden_tile, weight_tile.T, acc, input_precision="ieee")
    else:
        rows = tl.minimum(row + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        columns = tl.minimum(column + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        offs_d = tl.arange(0, BLOCK_D)
        hidden_ptrs = hidden + rows[:, None] * stride_hn + offs_d[None, :]
        weight_ptrs = weight + columns[None, :] * stride_wv + offs_d[:, None]
        for d in range(0, D, BLOCK_D):
            if EVEN_D:
                hidden_tile = tl.load(hidden_ptrs)  # [BLOCK_N, BLOCK_D]
                weight_tile = tl.load(weight_ptrs)  # [BLOCK_D, BLOCK_V]
            else:
                inside = offs_d < D - d
                hidden_tile = tl.load(hidden_ptrs, mask=inside[None, :], other=0.0)
                weight_tile = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
            acc = tl.dot(hidden_tile, weight_tile, acc, input_precision="ieee")
            hidden_ptrs += BLOCK_D
            weight_ptrs += BLOCK_D
    return acc


@triton.jit
def _split_columns(acc, PARTS: tl.constexpr):
    """A tile as a tuple of 1, 2 or 4 tiles of neighbouring columns; no data moves for it.

    Whole tiles of logits and what is made of them would not fit into the registers.
    """
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4)
    if PARTS == 1:
        parts = (acc,)
    elif PARTS == 2:
        parts = _halves(acc)
    else:
        left, right = _halves(acc)
        first, second = _halves(left)
        third, fourth = _halves(right)
        parts = (first, second, third, fourth)
    return parts


@triton.jit
def _halves(tile):
    pairs = tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1)
    return pairs.split()


@triton.jit
def _both_products(
    hidden, weight, ref_hidden, ref_weight, row, column, N, V, D, ref_D,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    EVEN_D: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Products of the policy and of the reference, each in ``PARTS`` groups of columns."""
    acc = _product(
        hidden, weight, row, column, N, V, D, D, D, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, USE_TMA
    )
    ref_acc = _product(
        ref_hidden, ref_weight, row, column, N, V, ref_D, ref_D, ref_D, BLOCK_N, BLOCK_V, BLOCK_D,
        EVEN_D, USE_TMA,
    )  # fmt: skip
    return _split_columns(acc, PARTS), _split_columns(ref_acc, PARTS)


@triton.jit
def _final_logits(
    acc,  # [BLOCK_N, BLOCK_V]
    bias_ptr,  # [V] or None
    columns,  # [BLOCK_V]
    V,
    inner,  # None where nothing is done to the product and the bias
    outer,  # None where there is no softcap
):
    """Final logits of ``final_logits.py``, not meaningful in columns beyond V."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < V, other=0.0)  # [BLOCK_V]
        acc += bias.to(tl.float32)[None, :]
    if inner is not None:
        acc, _ = finish_logits(acc, inner, outer, outer is not None)
    return acc


@triton.jit
def _without_padding(z, columns, V):
    """Logits with ``-inf`` in columns beyond V."""
    return tl.where((columns < V)[None, :], z, -float("inf"))


@triton.jit
def _finite(m):
    """A maximum that can be subtracted: 0 in a row of ``-inf``, so that ``exp(-inf - m)`` is 0."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _shift(old, new):
    """``old - new`` for running maxima, finite where ``old`` is still ``-inf``: exp of it is 0."""
    return tl.maximum(old - _finite(new), FLOOR)


@triton.jit
def _work_item(item, row_blocks, splits, GROUP_N: tl.constexpr):
    """Row block and vocabulary split of a work item.

    Row blocks vary fastest within groups of ``GROUP_N``: what runs at the same time shares a few
    tiles of the weight, and the group's hidden states stay in L2 while the weight streams by.
    """
    per_group = GROUP_N * splits
    first = (item // per_group) * GROUP_N
    size = tl.minimum(row_blocks - first, GROUP_N)
    within = item % per_group
    return first + within % size, within // size
