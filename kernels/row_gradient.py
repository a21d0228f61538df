"""The gradient of a loss by the raw products, from the products and the statistics of their rows.

``dz_v = g (onehot_v - p_v)`` for a loss with coefficient ``g`` on the row's log-prob, and
``-h p_v (log p_v + H)`` more for a coefficient ``h`` on its entropy ``H``, times the slope of the
final logits by the raw products. One program a row, one read and one write of the tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.configs import RowConfig, row_config
from fastdaa.kernels.elementary import exp, expm1, floored
from fastdaa.kernels.final_logits import finish_logits, load_products, logit_factors
from fastdaa.kernels.operands import mark_written, on_device

# In place, a row of gradients of 2 bytes begins where its row of logits of 4 bytes begins. Block k
# of B columns is read from bytes [4kB, 4kB + 4B) and written to [2kB, 2kB + 2B), which lies inside
# the bytes of logits block floor(k / 2). Blocks ascend and floor(k / 2) <= k, so what block k
# overwrites belongs to a block that the program has already loaded: in program order no write
# overtakes a read. Between the threads of a program the barrier keeps that order: no thread passes
# barrier k, and so none stores block k, before all threads have loaded blocks 0 to k. Gradients of
# 4 bytes overwrite their own block, for which the same holds. Rows belong to one program each, and
# [4iS, 4iS + 4V) of rows with stride S >= V do not overlap, so programs never meet.


_ROW_VECTORS = [
    "targets_ptr", "m_ptr", "log_s_ptr", "logps_ptr", "coefficients_ptr", "entropy_ptr",
    "entropy_coefficients_ptr", "rows_ptr",
]  # fmt: skip


# One value a program is read of a vector, so its alignment, which changes with the batch, is not
# worth a variant of the code.
@triton.jit(do_not_specialize_on_alignment=_ROW_VECTORS)
def _write_row_gradient_kernel(
    z_ptr, bias_ptr, targets_ptr, m_ptr, log_s_ptr, logps_ptr, coefficients_ptr,
    entropy_ptr, entropy_coefficients_ptr, rows_ptr,
    out_ptr,
    V, first_column, stride_zn, stride_on,
    inner, outer,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_ROWS: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    out_row = out_ptr + tl.program_id(0).to(tl.int64) * stride_on
    row = tl.program_id(0).to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_ptr + row)
    z_row = z_ptr + row * stride_zn
    g = tl.load(coefficients_ptr + row)
    idle = g == 0.0
    if HAS_ENTROPY:
        h = tl.load(entropy_coefficients_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        idle = idle & (h == 0.0)
    if idle:
        for start in range(0, V, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            zeros = tl.zeros([BLOCK_V], out_ptr.dtype.element_ty)
            tl.store(out_row + columns, zeros, mask=columns < V)
    else:
        m = tl.load(m_ptr + row)
        log_s = tl.load(log_s_ptr + row)
        logp = tl.load(logps_ptr + row)
        local = tl.load(targets_ptr + row) - first_column
        local = tl.where((local >= 0) & (local < V), local, -1).to(tl.int32)
        # 1 - p would round to 0 for a confident token.
        own = -g * expm1(logp)
        if HAS_ENTROPY:
            own -= h * exp(logp) * (floored(logp) + entropy)
        for start in range(0, V, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            inside = columns < V
            z = load_products(z_row, bias_ptr, columns, inside, HAS_BIAS)
            if IN_PLACE:
                tl.debug_barrier()
            z, slope = finish_logits(z, inner, outer, HAS_SOFTCAP)
            log_p = (z - m) - log_s
            dz = -g * exp(log_p)
            if HAS_ENTROPY:
                dz -= h * exp(log_p) * (floored(log_p) + entropy)
            dz = tl.where(columns == local, own, dz) * slope
            tl.store(out_row + columns, dz.to(out_ptr.dtype.element_ty), mask=inside)


def write_row_gradient(
    z: Tensor,
    targets: Tensor,
    m: Tensor,
    log_s: Tensor,
    logps: Tensor,
    coefficients: Tensor,
    *,
    dtype: torch.dtype,
    out: Tensor | None = None,
    rows: Tensor | None = None,
    first_column: int = 0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: Tensor | None = None,
    entropy_coefficients: Tensor | None = None,
    config: RowConfig | None = None,
) -> Tensor:
    """Gradient by the raw products ``z [r, c]``, over them or into ``out``.

    Rows whose coefficients are exactly 0 get zeros without being read.

    Args:
        z: fp32, columns ``first_column`` onwards of the head, contiguous along c.
        targets: ``[r]`` int64 over the whole vocabulary; those outside the tile have no entry.
        m, log_s, logps: ``[r]`` fp32, of whole rows, from :func:`take_row_statistics`.
        coefficients: ``[r]`` of the log-probs. For fp16 they carry the power of two that keeps
            small probabilities from underflowing.
        dtype: of the gradient: bf16, fp16 or fp32.
        out: ``[a, c]`` of ``dtype`` in memory of its own; None for the memory of ``z``.
        rows: ``[a]`` int64: gradients of these rows only, which needs ``out``.
        first_column: of the tile.
        bias: ``[c]`` of the tile's columns.
        logit_scale, softcap, temperature: of the head.
        entropy, entropy_coefficients: ``[r]`` fp32, both or none: the row's entropy and the
            coefficient of it in the loss.
        config: block sizes; None for the table's.

    Returns:
        ``out``, or a view ``[r, c]`` of ``z``'s memory whose rows begin where those of ``z`` do.

    Raises:
        ValueError: arguments that do not fit together.
    """
    apart = z.shape[0] <= 1 or z.stride(0) >= z.shape[1]
    if z.dtype != torch.float32 or z.stride(1) != 1 or not apart:
        raise ValueError(
            f"z: expected fp32 with contiguous columns and rows apart, got {z.dtype} with strides "
            f"{list(z.stride())}"
        )
    if (entropy is None) != (entropy_coefficients is None):
        raise ValueError("entropy: expected both entropy and entropy_coefficients, or neither")
    count = z.shape[0] if rows is None else rows.shape[0]
    target = _output(z, dtype, out, rows is not None)
    config = config or row_config("row_gradient", z.device)
    inner, outer = logit_factors(logit_scale, softcap, temperature)
    vectors = [
        t if t is None else t.contiguous()
        for t in (targets, m, log_s, logps, coefficients, entropy, entropy_coefficients, rows)
    ]
    if count and z.shape[1]:
        with on_device(z):
            _write_row_gradient_kernel[(count,)](
                z, bias if bias is None else bias.contiguous(), *vectors,
                target,
                z.shape[1], first_column, z.stride(0), target.stride(0),
                inner, outer,
                HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
                HAS_ENTROPY=entropy is not None, HAS_ROWS=rows is not None, IN_PLACE=out is None,
                BLOCK_V=config.block_v, num_warps=config.num_warps, enable_fp_fusion=True,
            )  # fmt: skip
        mark_written(target)
    return target


def _output(z: Tensor, dtype: torch.dtype, out: Tensor | None, picked: bool) -> Tensor:
    """``out``, or the memory of ``z`` as rows of ``dtype`` that begin where those of ``z`` do."""
    if out is None:
        if picked:
            raise ValueError("rows: expected an out of their own, because rows would move over "
                             "others that are still to be read")  # fmt: skip
        return z if dtype == z.dtype else z.view(dtype)[:, : z.shape[1]]
    if out.untyped_storage().data_ptr() == z.untyped_storage().data_ptr() and z.numel():
        raise ValueError("out: expected memory of its own, got that of z; None means in place")
    if out.dtype != dtype or out.shape[1] != z.shape[1] or out.stride(1) != 1:
        raise ValueError(
            f"out: expected {dtype} with {z.shape[1]} contiguous columns, got {out.dtype} of shape "
            f"{list(out.shape)} with strides {list(out.stride())}"
        )
    return out
