"""What one program of an objective kernel reads and writes for the two sequences of its pair."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum_tokens(values_ptr, begin, end, BLOCK: tl.constexpr):
    """Sum of ``values[begin:end]``, in fp64 and rounded once to fp32."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + offs, mask=offs < end, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0).to(tl.float32)


@triton.jit
def _sum_sequence(
    logps_ptr, ref_ptr, begin, end, sequence, REF_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr
):
    """Log-prob of a sequence under policy and reference (0 without one), both fp32 scalars."""
    policy = _sum_tokens(logps_ptr, begin, end, BLOCK)
    if ref_ptr is None:
        ref = policy * 0.0
    elif REF_PER_TOKEN:
        ref = _sum_tokens(ref_ptr, begin, end, BLOCK)
    else:
        ref = tl.load(ref_ptr + sequence).to(tl.float32)
    return policy, ref


@triton.jit
def _write_metrics(
    chosen, rejected, ref_chosen, ref_rejected, pair, sums_ptr, rewards_ptr, margins_ptr,
    accuracies_ptr, reward_scale,
):  # fmt: skip
    chosen_reward = reward_scale * (chosen - ref_chosen)
    rejected_reward = reward_scale * (rejected - ref_rejected)
    tl.store(sums_ptr + 2 * pair, chosen)
    tl.store(sums_ptr + 2 * pair + 1, rejected)
    tl.store(rewards_ptr + 2 * pair, chosen_reward)
    tl.store(rewards_ptr + 2 * pair + 1, rejected_reward)
    tl.store(margins_ptr + pair, chosen_reward - rejected_reward)
    tl.store(accuracies_ptr + pair, (chosen_reward > rejected_reward).to(tl.float32))


@triton.jit
def _fill_tokens(out_ptr, begin, end, value, BLOCK: tl.constexpr):
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + offs, tl.zeros((BLOCK,), tl.float32) + value, mask=offs < end)
