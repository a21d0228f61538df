"""Raw products of hidden states and head to final logits, inside a kernel.

``final = cap(logit_scale * (product + bias)) / temperature`` with ``cap(z) = c tanh(z / c)``. Two
factors hold every option: ``final = outer * tanh(inner * (product + bias))`` with a cap, and
``final = inner * (product + bias)`` without one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdaa.kernels.elementary import tanh_and_slope


def logit_factors(
    logit_scale: float, softcap: float | None, temperature: float
) -> tuple[float, float]:
    """``inner`` and ``outer`` of a head, see the top of this file."""
    if softcap is None:
        return logit_scale / temperature, 1.0
    return logit_scale / softcap, softcap / temperature


@triton.jit
def load_products(row_ptr, bias_ptr, columns, inside, HAS_BIAS: tl.constexpr):
    """``product + bias`` at some columns of one row, fp32; 0 outside."""
    z = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return z


@triton.jit
def finish_logits(z, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """Final logits, and their slope by the raw products."""
    if HAS_SOFTCAP:
        u, du = tanh_and_slope(inner * z)
        return outer * u, (inner * outer) * du
    else:
        return inner * z, inner
