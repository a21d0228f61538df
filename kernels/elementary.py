"""Elementary functions that Triton lacks on GPUs or in its interpreter, for fp32.

Each is written from its definition, with the error that was measured against fp64 in
``tests/test_kernels_rows.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp(FLOOR) is 0 in fp32. As a lower bound it keeps -inf out of products and differences.
FLOOR = tl.constexpr(-1.0e4)
# Below every logit that a softmax can tell from -inf: the start of a running maximum.
LOWEST = tl.constexpr(-3.0e38)
_ONE = tl.constexpr(2.0**40)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """``exp(x)``, 0 where that is below the normal numbers.

    On GPUs as accurate as ``tl.exp``, which takes four instructions a value more for them.
    """
    return tl.exp2(x * _LOG2E)


@triton.jit
def floored(x):
    """``max(x, FLOOR)``; a NaN stays NaN."""
    return tl.maximum(x, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for ``x >= 0``, also where ``1 + x`` rounds to 1.

    ``u - 1`` is what ``u = 1 + x`` has kept of ``x``; the quotient undoes the rounding.
    """
    u = 1.0 + x
    kept = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.where(u == 1.0, x, tl.where(u > 1.0e8, tl.log(u), tl.log(u) * (x / kept)))


@triton.jit
def expm1(x):
    """``exp(x) - 1`` for ``x <= 0``, without cancellation near 0: a Taylor polynomial there."""
    tail = 1.0 / 40320.0 + x * (1.0 / 362880.0 + x * (1.0 / 3628800.0))
    tail = 1.0 / 120.0 + x * (1.0 / 720.0 + x * (1.0 / 5040.0 + x * tail))
    near = x + x * x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * tail)))
    return tl.where(x > -0.7, near, tl.exp(x) - 1.0)


@triton.jit
def tanh_and_slope(x):
    """``tanh(x)`` and its derivative ``1 - tanh(x)^2``, which keeps its digits for large ``x``.

    Below 0.55 an odd polynomial of degree 11, fitted to ``tanh`` on ``[0, 0.6]``.
    """
    e = exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    t = x * x
    p = -0.053875137 + t * (0.021116214 + t * -0.0062763877)
    p = -0.33333331 + t * (0.13332924 + t * p)
    far = (1.0 - e) * r
    u = tl.where(t < 0.3025, x + x * (t * p), tl.where(x < 0.0, -far, far))
    return u, 4.0 * e * (r * r)


@triton.jit
def exact_sum(x):
    """Sum of lanes, each below 2^9 in size, the same bits in any order; NaN if one of them is.

    In fixed point of 2^-40: how lanes lie in threads, and so the order of a sum of floats, depends
    on what else a kernel reads and writes.
    """
    valid = x == x
    parts = (tl.where(valid, x, 0.0) * _ONE).to(tl.int64)
    total = tl.sum(parts, axis=0).to(tl.float32) * (1.0 / _ONE)
    return tl.where(tl.min(valid.to(tl.int32), axis=0) == 0, float("nan"), total)
