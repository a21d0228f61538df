"""Statistics of rows of logits and their gradient ``d logp / d z`` in one read of the tile.

``d logp / d z_v = onehot_v - p_v`` needs the log-sum-exp of the row, which is known when the row
has been read. Up to a factor of the row it does not: with ``p_v = p_t exp(z_v - z_t)`` for the
target ``t``, whose logit is read first, the entries beside the target are

    -p_v = p_t s_v,   s_v = -exp(z_v - z_t),

and ``p_t`` scales the row of the next product. bf16 keeps its 8 bits over the whole range of such
ratios, which fp16 does not. The entry of the target, ``1 - p_t``, is left to the caller: it is the
largest, it is known in fp32, and it need not be rounded as the others are. Rows with a target less
likely than ``exp(LEAST_LOGP)`` are read again by a second kernel and get ``-p`` itself, with factor
1: their ratios would be out of proportion.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.configs import RowConfig, row_config
from fastdaa.kernels.elementary import exp
from fastdaa.kernels.final_logits import finish_logits, load_products, logit_factors
from fastdaa.kernels.merge_splits import RowStatistics, merge_splits
from fastdaa.kernels.operands import mark_written, on_device
from fastdaa.kernels.row_statistics import take_row_states

LEAST_LOGP = tl.constexpr(-32.0)
_VECTORS = ["targets_ptr", "m_ptr", "log_s_ptr", "logps_ptr", "factors_ptr"]


# One value a program is read of a vector, so its alignment is not worth a variant of the code.
@triton.jit(do_not_specialize_on_alignment=_VECTORS)
def _finish_row_slopes_kernel(
    z_ptr,  # [rows, V]
    bias_ptr,  # [V] or None
    targets_ptr,  # [rows] int64
    m_ptr,  # [rows], as the next three
    log_s_ptr,
    logps_ptr,
    factors_ptr,
    slopes_ptr,  # [rows, V], or the first columns of that
    V, stride_zn, stride_on,
    inner, outer,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row, out_row = z_ptr + row * stride_zn, slopes_ptr + row * stride_on
    logp = tl.load(logps_ptr + row)
    if logp > LEAST_LOGP:
        tl.store(factors_ptr + row, exp(logp))
    else:
        target = tl.load(targets_ptr + row)
        m = tl.load(m_ptr + row)
        log_s = tl.load(log_s_ptr + row)
        for start in range(0, V, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            inside = columns < V
            z = load_products(z_row, bias_ptr, columns, inside, HAS_BIAS)
            z, slope = finish_logits(z, inner, outer, HAS_SOFTCAP)
            value = tl.where(columns == target, 0.0, -exp((z - m) - log_s) * slope)
            tl.store(out_row + columns, value.to(slopes_ptr.dtype.element_ty), mask=inside)
        tl.store(factors_ptr + row, 1.0)


def take_row_slopes(
    z: Tensor,
    targets: Tensor,
    slopes: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    stats: bool = False,
    config: RowConfig | None = None,
) -> tuple[RowStatistics, Tensor]:
    """Statistics of whole rows, and ``d logp / d z`` beside the target up to a factor of the row.

    Args:
        z: ``[r, V]`` raw products, as in :func:`fastdaa.kernels.row_statistics.take_row_states`;
            not changed.
        targets: ``[r]`` int64.
        slopes: ``[r, V]``, or fewer columns if only the first ones are wanted, bf16 (or fp32) with
            contiguous columns, in memory of its own; filled.
        bias, logit_scale, softcap, temperature, stats, config: as there.

    Returns:
        The statistics and factors ``[r]`` fp32: the derivative of the target's log-prob by the raw
        products is ``factors[:, None] * slopes``, which is 0 at the target.

    Raises:
        ValueError: slopes of another shape or of fp16, or columns that are not contiguous.
    """
    rows_fit = slopes.shape[0] == z.shape[0] and 0 < slopes.shape[1] <= z.shape[1]
    if not rows_fit or slopes.dtype == torch.float16 or slopes.stride(1) != 1:
        raise ValueError(
            f"slopes: expected {list(z.shape)} of bf16 or fp32 with contiguous columns, got "
            f"{list(slopes.shape)} of {slopes.dtype} with strides {list(slopes.stride())}"
        )
    head: dict[str, Any] = {
        "bias": bias, "logit_scale": logit_scale, "softcap": softcap, "temperature": temperature
    }  # fmt: skip
    states = take_row_states(z, targets, stats=stats, slopes=slopes, config=config, **head)
    rows = merge_splits(states, targets, z.shape[1])
    factors = torch.empty_like(rows.logps)
    block = row_config("row_gradient", z.device)
    if z.shape[0]:
        with on_device(z):
            _finish_row_slopes_kernel[(z.shape[0],)](
                z, bias if bias is None else bias.contiguous(), targets.contiguous(),
                rows.m, rows.log_s, rows.logps, factors, slopes,
                slopes.shape[1], z.stride(0), slopes.stride(0),
                *logit_factors(logit_scale, softcap, temperature),
                HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, BLOCK_V=block.block_v,
                num_warps=block.num_warps, enable_fp_fusion=True,
            )  # fmt: skip
        mark_written(slopes)
    return rows, factors
