"""The state of a row from those of its vocabulary splits, and its log-probability and metrics.

The second kernel of ``score_tokens``. Splits are merged in their order, and the target, which none
of them has counted, joins last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdaa.kernels.elementary import FLOOR, exp, log1p
from fastdaa.kernels.logit_tile import _finite, _shift


@triton.jit(do_not_specialize=["N"])
def _merge_splits_kernel(
    states_ptr,  # [splits, fields, N] fp32
    targets_ptr,  # [N] int64
    m_ptr,  # [N], as all outputs
    log_s_ptr,
    target_logit_ptr,
    logps_ptr,
    entropy_ptr,
    top1_ptr,
    mean_logit_ptr,
    sum_p2_ptr,
    N,
    V,
    splits,
    BLOCK: tl.constexpr,
    STATS: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs_n < N
    field = tl.cast(N, tl.int64)
    m = tl.full((BLOCK,), -float("inf"), tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    target = tl.full((BLOCK,), -float("inf"), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    in_ptrs = states_ptr + offs_n
    for _ in range(splits):
        split_m = tl.load(in_ptrs, mask=inside, other=0.0)
        split_s = tl.load(in_ptrs + field, mask=inside, other=1.0)
        split_target = tl.load(in_ptrs + 2 * field, mask=inside, other=0.0)
        target = tl.where(split_target == -float("inf"), target, split_target)
        new_m = tl.maximum(m, split_m)
        d, split_d = _shift(m, new_m), _shift(split_m, new_m)
        scale, split_scale = exp(d), exp(split_d)
        if STATS:
            split_weighted = tl.load(in_ptrs + 3 * field, mask=inside, other=0.0)
            split_squares = tl.load(in_ptrs + 4 * field, mask=inside, other=0.0)
            total += tl.load(in_ptrs + 5 * field, mask=inside, other=0.0)
            weighted = scale * (weighted + d * s)
            weighted += split_scale * (split_weighted + split_d * split_s)
            squares = scale * scale * squares + split_scale * split_scale * split_squares
        s = scale * s + split_scale * split_s
        m = new_m
        in_ptrs += (6 if STATS else 3) * field
    wanted = tl.load(targets_ptr + offs_n, mask=inside, other=0)
    target = tl.where((wanted >= 0) & (wanted < V), target, float("nan"))
    # The target joins the others: they shift by d, and own = exp(y) of the target.
    top = _finite(tl.maximum(m, target))
    d = _shift(m, top)
    y = target - top
    own = exp(y)
    rest = exp(d) * s
    log_s = tl.where(y == 0.0, log1p(rest), tl.log(rest + own))
    tl.store(m_ptr + offs_n, top, mask=inside)
    tl.store(log_s_ptr + offs_n, log_s, mask=inside)
    tl.store(target_logit_ptr + offs_n, target, mask=inside)
    tl.store(logps_ptr + offs_n, y - log_s, mask=inside)
    if STATS:
        norm = exp(-log_s)
        weighted = exp(d) * (weighted + d * s) + tl.maximum(y, FLOOR) * own
        squares = exp(2.0 * d) * squares + own * own
        tl.store(entropy_ptr + offs_n, log_s - weighted * norm, mask=inside)
        tl.store(top1_ptr + offs_n, (target >= m).to(tl.float32), mask=inside)
        tl.store(mean_logit_ptr + offs_n, total / V, mask=inside)
        tl.store(sum_p2_ptr + offs_n, squares * norm * norm, mask=inside)
