"""Sums of the columns of a tile, for the gradient of a bias: two passes, no atomics.

Rows are cut into parts whose sums go to a small table, the table is summed the same way. The parts
depend on the number of rows alone, so results repeat to the last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.configs import RowConfig, row_config
from fastdaa.kernels.operands import on_device

ROWS_OF_A_PART = 512


# Numbers of rows change from batch to batch, and need no code of their own.
@triton.jit(do_not_specialize=["N", "rows_of_a_part"])
def _sum_columns_kernel(
    x_ptr,
    out_ptr,
    N, V, rows_of_a_part, column_blocks, stride_xn, stride_on,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # One axis of programs: the second one of a grid ends at 65535.
    part = tl.program_id(0) // column_blocks
    columns = (tl.program_id(0) % column_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < V
    first = part * rows_of_a_part
    last = tl.minimum(first + rows_of_a_part, N)
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        offsets = rows[:, None].to(tl.int64) * stride_xn + columns[None, :]
        mask = (rows < last)[:, None] & inside[None, :]
        acc += tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    sums = tl.sum(acc, axis=0)  # [BLOCK_V]
    tl.store(out_ptr + part.to(tl.int64) * stride_on + columns, sums, mask=inside)


def sum_columns(x: Tensor, *, config: RowConfig | None = None) -> Tensor:
    """Sums ``[c]`` in fp32 of the columns of ``x [r, c]``.

    Args:
        x: bf16, fp16 or fp32, contiguous along c, any row stride.
        config: block sizes; None for the table's.

    Raises:
        ValueError: columns that are not contiguous.
    """
    if x.stride(1) != 1:
        raise ValueError(f"x: expected contiguous columns, got strides {list(x.stride())}")
    config = config or row_config("column_sums", x.device)
    parts = triton.cdiv(x.shape[0], ROWS_OF_A_PART)
    if parts == 0 or x.shape[1] == 0:
        return torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    table = _sum_parts(x, parts, ROWS_OF_A_PART, config)
    return table[0] if parts == 1 else _sum_parts(table, 1, parts, config)[0]


def _sum_parts(x: Tensor, parts: int, rows_of_a_part: int, config: RowConfig) -> Tensor:
    """``[parts, c]``: sums of the columns over consecutive rows."""
    out = torch.empty((parts, x.shape[1]), dtype=torch.float32, device=x.device)
    column_blocks = triton.cdiv(x.shape[1], config.block_v)
    with on_device(x):
        _sum_columns_kernel[(parts * column_blocks,)](
            x,
            out,
            *x.shape, rows_of_a_part, column_blocks, x.stride(0), out.stride(0),
            BLOCK_N=config.block_n, BLOCK_V=config.block_v,
            num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out
