"""Statistics of whole rows of logits in one pass: log-sum-exp, target log-prob, optional metrics.

One program a row. Every lane keeps a running maximum and sum of its own columns, so nothing is
exchanged between lanes until the row ends, and the order of all sums is fixed. The target is left
out of the sums and joins at the end: where it is the maximum, its 1 would swallow the rest, and a
confident token would have a log-prob of 0. The derivation is in README.md of this folder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.configs import RowConfig, row_config
from fastdaa.kernels.elementary import LOWEST, exp, floored, log1p
from fastdaa.kernels.final_logits import finish_logits, load_products, logit_factors


class RowStatistics(NamedTuple):
    """What one pass gives; all ``[r]`` fp32, the last four None unless asked for."""

    m: Tensor
    """Maximum of the final logits, or 0 in a row of ``-inf``."""
    log_s: Tensor
    """Log of the sum of ``exp(z - m)``."""
    logps: Tensor
    """Log-probability of the target; NaN for a target outside ``[0, V)``."""
    entropy: Tensor | None
    """Entropy in nats."""
    top1: Tensor | None
    """1 where no other logit exceeds the target's, else 0."""
    mean_logit: Tensor | None
    """Mean of the final logits."""
    sum_p2: Tensor | None
    """Sum of the squared probabilities."""


# The alignment of vectors that are read one value a program, and of their number, changes with the
# batch: a variant of the code for each would be compiled in the middle of training.
@triton.jit(do_not_specialize=["stride_ok"], do_not_specialize_on_alignment=["targets_ptr"])
def _take_row_statistics_kernel(
    z_ptr, bias_ptr, targets_ptr,
    out_ptr,
    V, stride_zn, stride_ok,
    inner, outer,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride_zn
    target = tl.load(targets_ptr + row)
    valid = (target >= 0) & (target < V)
    target = tl.where(valid, target, -1).to(tl.int32)

    m = tl.full([BLOCK_V], LOWEST, tl.float32)  # running maximum of a lane
    s = tl.zeros([BLOCK_V], tl.float32)  # sum of e = exp(z - m)
    w = tl.zeros([BLOCK_V], tl.float32)  # sum of e (z - m)
    q = tl.zeros([BLOCK_V], tl.float32)  # sum of e^2
    total = tl.zeros([BLOCK_V], tl.float32)  # sum of z
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < V
        z = load_products(z_row, bias_ptr, columns, inside, HAS_BIAS)
        z, _ = finish_logits(z, inner, outer, HAS_SOFTCAP)
        if HAS_STATS:
            total += tl.where(inside, z, 0.0)
        z = tl.where(inside & (columns != target), z, float("-inf"))
        # One exponential serves both cases: e of the new logit, or the factor on the old sums.
        above = z > m
        gap = floored(-tl.abs(z - m))
        e = exp(gap)
        if HAS_STATS:
            w = tl.where(above, e * (w + s * gap), w + e * gap)
            q = tl.where(above, q * (e * e) + 1.0, q + e * e)
        s = tl.where(above, s * e + 1.0, s + e)
        m = tl.where(above, z, m)

    # The lanes become one, then the target joins.
    rest_top = tl.max(m, axis=0)
    gap = floored(m - rest_top)
    e = exp(gap)
    own_z = load_products(z_row, bias_ptr, target, valid, HAS_BIAS)
    own_z, _ = finish_logits(own_z, inner, outer, HAS_SOFTCAP)
    own_z = tl.where(valid, own_z, float("nan"))
    top = tl.where(own_z > rest_top, own_z, rest_top)
    shift = floored(rest_top - top)
    lift = exp(shift)
    rest = tl.sum(s * e, axis=0) * lift
    own_gap = floored(own_z - top)
    own = exp(own_gap)
    log_s = tl.where(own == 1.0, log1p(rest), tl.log(rest + own))
    highest = tl.where(top == LOWEST, 0.0, top)
    tl.store(out_ptr + row, highest)
    tl.store(out_ptr + stride_ok + row, log_s)
    tl.store(out_ptr + 2 * stride_ok + row, (own_z - highest) - log_s)
    if HAS_STATS:
        rest_w = tl.sum(e * (w + s * gap), axis=0) * lift + rest * shift
        rest_q = tl.sum(q * (e * e), axis=0) * (lift * lift)
        inverse = exp(-log_s)
        entropy = log_s - (rest_w + own * own_gap) * inverse
        tl.store(out_ptr + 3 * stride_ok + row, entropy)
        first = (own_z >= rest_top) | (top == LOWEST)
        tl.store(out_ptr + 4 * stride_ok + row, first.to(tl.float32))
        tl.store(out_ptr + 5 * stride_ok + row, tl.sum(total, axis=0) / V)
        tl.store(out_ptr + 6 * stride_ok + row, (rest_q + own * own) * (inverse * inverse))


def take_row_statistics(
    z: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    stats: bool = False,
    config: RowConfig | None = None,
) -> RowStatistics:
    """Statistics of every row of a tile of raw products, which is read once and not changed.

    Args:
        z: ``[r, V]`` products of hidden states and weight, any floating dtype up to fp32 (fp32
            keeps the accuracy contract), contiguous along V, any row stride.
        targets: ``[r]`` int64, any stride.
        bias: ``[V]``, any floating dtype.
        logit_scale: factor on the logits before the cap.
        softcap: cap of the logits, or None.
        temperature: divisor of the logits after the cap.
        stats: also take the four metrics.
        config: block sizes; None for the table's.

    Raises:
        ValueError: columns that are not contiguous, or no column.
    """
    rows, v = z.shape
    if v == 0 or z.stride(1) != 1:
        raise ValueError(
            f"z: expected [r, V > 0] with contiguous columns, got shape {list(z.shape)} with "
            f"strides {list(z.stride())}"
        )
    config = config or row_config("row_statistics", z.device)
    out = torch.empty((7 if stats else 3, rows), dtype=torch.float32, device=z.device)
    inner, outer = logit_factors(logit_scale, softcap, temperature)
    if rows:
        with torch.cuda.device_of(z):
            _take_row_statistics_kernel[(rows,)](
                z, bias if bias is None else bias.contiguous(), targets.contiguous(),
                out,
                v, z.stride(0), out.stride(0),
                inner, outer,
                HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_STATS=stats,
                BLOCK_V=config.block_v, num_warps=config.num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return RowStatistics(*out.unbind(), *([] if stats else [None] * 4))
