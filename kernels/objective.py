"""A preference objective in one launch: token log-probs in, losses, coefficients and metrics out.

One program a pair. It sums both completions in fp64 and a fixed order (a sum over hundreds of
tokens in fp32 alone would lose a thousandth of a nat), rounds the sums to fp32 as those of the
reference were, evaluates the objective that it was compiled for, and writes what the backward pass
and the metrics need. The objective is a jitted function of ``objective_functions.py``, not a case
in a ladder.

Checked in Triton's interpreter and by compiling ahead of time; it has not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.operands import on_device
from fastdaa.kernels.sequences import _fill_tokens, _sum_sequence, _write_metrics

_BLOCK, _WARPS = 512, 4
_VECTORS = [
    "logps_ptr", "offsets_ptr", "ref_ptr", "lengths_ptr", "advantages_ptr", "sums_ptr",
    "losses_ptr", "coefficients_ptr", "token_coefficients_ptr", "rewards_ptr", "margins_ptr",
    "accuracies_ptr",
]  # fmt: skip


class PairValues(NamedTuple):
    """What one launch gives for ``B`` pairs, ``S = 2B`` sequences and ``N`` tokens; all fp32."""

    sequence_logps: Tensor
    """``[S]`` sums of the token log-probs."""
    losses: Tensor
    """``[B]`` unreduced."""
    coefficients: Tensor | None
    """``[S]`` derivative of ``losses`` by the sequence's log-prob; None for a token objective."""
    token_coefficients: Tensor | None
    """``[N]`` the same by every token's log-prob; None unless asked for."""
    rewards: Tensor
    """``[S]`` ``reward_scale * (policy - reference)``."""
    margins: Tensor
    """``[B]`` chosen less rejected reward."""
    accuracies: Tensor
    """``[B]`` 1 where the chosen reward is the larger one, else 0."""


# Chunks of a batch begin anywhere in its vectors, so alignment is not worth a variant of the code.
# Launched without fused multiply-adds: a difference of two equal products is exactly 0, as it is in
# the formula that autograd takes.
@triton.jit(do_not_specialize_on_alignment=_VECTORS)
def _evaluate_pairs_kernel(
    logps_ptr,  # [N]
    offsets_ptr,  # [S + 1] int64
    ref_ptr,  # [S], [N] or None
    lengths_ptr,  # [S] int64 or None
    sums_ptr,  # [S]
    losses_ptr,  # [B]
    coefficients_ptr,  # [S]
    token_coefficients_ptr,  # [N] or None
    rewards_ptr,  # [S]
    margins_ptr,  # [B]
    accuracies_ptr,  # [B]
    p0,
    p1,
    p2,
    likelihood,
    reward_scale,
    OBJECTIVE: tl.constexpr,
    NEEDS_REF: tl.constexpr,
    REF_PER_TOKEN: tl.constexpr,
    LENGTH_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + 2 * pair)
    middle = tl.load(offsets_ptr + 2 * pair + 1)
    end = tl.load(offsets_ptr + 2 * pair + 2)
    chosen, ref_chosen = _sum_sequence(
        logps_ptr, ref_ptr, begin, middle, 2 * pair, REF_PER_TOKEN, BLOCK
    )
    rejected, ref_rejected = _sum_sequence(
        logps_ptr, ref_ptr, middle, end, 2 * pair + 1, REF_PER_TOKEN, BLOCK
    )
    if lengths_ptr is None:
        chosen_length, rejected_length = middle - begin, end - middle
    else:
        chosen_length = tl.load(lengths_ptr + 2 * pair)
        rejected_length = tl.load(lengths_ptr + 2 * pair + 1)
    a, b = chosen.to(tl.float64), rejected.to(tl.float64)
    if NEEDS_REF:
        a -= ref_chosen.to(tl.float64)
        b -= ref_rejected.to(tl.float64)
    loss, slope_a, slope_b = OBJECTIVE(
        a, b, chosen_length.to(tl.float64), rejected_length.to(tl.float64),
        tl.cast(p0, tl.float64), tl.cast(p1, tl.float64), tl.cast(p2, tl.float64),
        tl.cast(likelihood, tl.float64), LENGTH_NORM,
    )  # fmt: skip
    slope_a, slope_b = slope_a.to(tl.float32), slope_b.to(tl.float32)
    tl.store(losses_ptr + pair, loss.to(tl.float32))
    tl.store(coefficients_ptr + 2 * pair, slope_a)
    tl.store(coefficients_ptr + 2 * pair + 1, slope_b)
    if token_coefficients_ptr is not None:
        _fill_tokens(token_coefficients_ptr, begin, middle, slope_a, BLOCK)
        _fill_tokens(token_coefficients_ptr, middle, end, slope_b, BLOCK)
    _write_metrics(
        chosen, rejected, ref_chosen, ref_rejected, pair, sums_ptr, rewards_ptr, margins_ptr,
        accuracies_ptr, reward_scale,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_VECTORS)
def _evaluate_tokens_kernel(
    logps_ptr,  # [N]
    offsets_ptr,  # [S + 1] int64
    ref_ptr,  # [N] or None
    advantages_ptr,  # [S] or None: +1 for chosen, -1 for rejected
    sums_ptr,  # [S]
    losses_ptr,  # [B]
    token_coefficients_ptr,  # [N]
    rewards_ptr,  # [S]
    margins_ptr,  # [B]
    accuracies_ptr,  # [B]
    p0,
    p1,
    weight,
    reward_scale,
    OBJECTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    p0, p1 = tl.cast(p0, tl.float64), tl.cast(p1, tl.float64)
    factor = tl.cast(weight, tl.float64)
    loss = tl.zeros((BLOCK,), tl.float64)
    for side in range(2):
        begin = tl.load(offsets_ptr + 2 * pair + side)
        end = tl.load(offsets_ptr + 2 * pair + side + 1)
        if advantages_ptr is None:
            advantage = 1.0 - 2.0 * side + 0.0 * p0
        else:
            advantage = tl.load(advantages_ptr + 2 * pair + side).to(tl.float64)
        for start in range(begin, end, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            inside = offs < end
            logps = tl.load(logps_ptr + offs, mask=inside, other=0.0).to(tl.float64)
            if ref_ptr is None:
                ref = tl.zeros((BLOCK,), tl.float64)
            else:
                ref = tl.load(ref_ptr + offs, mask=inside, other=0.0).to(tl.float64)
            value, slope = OBJECTIVE(logps, ref, advantage, p0, p1)
            loss += tl.where(inside, value, 0.0)
            slope = tl.zeros((BLOCK,), tl.float64) + factor * slope
            tl.store(token_coefficients_ptr + offs, slope.to(tl.float32), mask=inside)
    tl.store(losses_ptr + pair, (factor * tl.sum(loss, axis=0)).to(tl.float32))
    begin = tl.load(offsets_ptr + 2 * pair)
    middle = tl.load(offsets_ptr + 2 * pair + 1)
    end = tl.load(offsets_ptr + 2 * pair + 2)
    chosen, ref_chosen = _sum_sequence(logps_ptr, ref_ptr, begin, middle, 2 * pair, True, BLOCK)
    rejected, ref_rejected = _sum_sequence(
        logps_ptr, ref_ptr, middle, end, 2 * pair + 1, True, BLOCK
    )
    _write_metrics(
        chosen, rejected, ref_chosen, ref_rejected, pair, sums_ptr, rewards_ptr, margins_ptr,
        accuracies_ptr, reward_scale,
    )  # fmt: skip


def evaluate_pairs(
    objective: Any,
    token_logps: Tensor,  # [N]
    offsets: Tensor,  # [S + 1] int64
    *,
    ref_logps: Tensor | None = None,  # [S]
    ref_token_logps: Tensor | None = None,  # [N]
    completion_lengths: Tensor | None = None,  # [S] int64
    parameters: tuple[float, ...] = (),
    needs_ref: bool = True,
    length_norm: bool = False,
    likelihood: float = 0.0,
    reward_scale: float = 1.0,
    token_coefficients: bool = False,
) -> PairValues:
    """Evaluate a pair objective on ``B`` pair-major pairs.

    Args:
        objective: ``fn`` of a ``PairObjective``, or a jitted function of that signature.
        token_logps: fp32, sequence by sequence; sequence ``2i`` is the chosen one of pair ``i``.
        offsets: where each sequence begins, and N at the end.
        ref_logps, ref_token_logps: fp32; at most one of the two.
        completion_lengths: divisors of per-token means; None for the numbers of tokens.
        parameters: hyperparameters in the order of the objective, at most three; rounded to fp32.
        needs_ref: whether the objective sees log-ratios or the policy's log-probs.
        likelihood: pairs over chosen tokens of the whole batch, for objectives with that term.
        reward_scale: beta of the logged rewards.
        token_coefficients: also write the coefficient of every token.

    Raises:
        ValueError: a missing or superfluous reference, or shapes that do not fit.
    """
    pairs = _check(token_logps, offsets, completion_lengths, ref_logps, ref_token_logps)
    ref = ref_logps if ref_token_logps is None else ref_token_logps
    if needs_ref and ref is None:
        raise ValueError("expected ref_logps or ref_token_logps for this objective, got neither")
    if len(parameters) > 3:
        raise ValueError(f"parameters: expected at most 3, got {len(parameters)}")
    sums, losses, coefficients, rewards, margins, accuracies = _buffers(
        token_logps, (2 * pairs, pairs, 2 * pairs, 2 * pairs, pairs, pairs)
    )
    per_token = torch.empty_like(token_logps) if token_coefficients else None
    if pairs:
        with on_device(token_logps):
            _evaluate_pairs_kernel[(pairs,)](
                token_logps, offsets, ref, completion_lengths,
                sums, losses, coefficients, per_token, rewards, margins, accuracies,
                *(float(p) for p in (*parameters, 0.0, 0.0, 0.0)[:3]),
                float(likelihood), float(reward_scale),
                objective, needs_ref, ref_token_logps is not None, length_norm, _BLOCK,
                num_warps=_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return PairValues(sums, losses, coefficients, per_token, rewards, margins, accuracies)


def evaluate_tokens(
    objective: Any,
    token_logps: Tensor,  # [N]
    offsets: Tensor,  # [S + 1] int64
    *,
    ref_token_logps: Tensor | None = None,  # [N]
    advantages: Tensor | None = None,  # [S]
    parameters: tuple[float, ...] = (),
    weight: float = 1.0,
    reward_scale: float = 1.0,
) -> PairValues:
    """Evaluate a token objective; a pair's loss is ``weight`` times the sum over its tokens.

    Args:
        objective: a function of ``TOKEN_OBJECTIVES``, or a jitted function of that signature.
        ref_token_logps: fp32; None for an objective that does not read it.
        advantages: one a sequence; None for +1 (chosen) and -1 (rejected).
        parameters: hyperparameters in the order of the objective, at most two.
        weight: pairs over scored tokens of the whole batch.

    The rest is as in :func:`evaluate_pairs`.
    """
    pairs = _check(token_logps, offsets, advantages, None, ref_token_logps)
    if len(parameters) > 2:
        raise ValueError(f"parameters: expected at most 2, got {len(parameters)}")
    sums, losses, per_token, rewards, margins, accuracies = _buffers(
        token_logps, (2 * pairs, pairs, token_logps.numel(), 2 * pairs, pairs, pairs)
    )
    if pairs:
        with on_device(token_logps):
            _evaluate_tokens_kernel[(pairs,)](
                token_logps, offsets, ref_token_logps, advantages,
                sums, losses, per_token, rewards, margins, accuracies,
                *(float(p) for p in (*parameters, 0.0, 0.0)[:2]),
                float(weight), float(reward_scale), objective, _BLOCK,
                num_warps=_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return PairValues(sums, losses, None, per_token, rewards, margins, accuracies)


def _buffers(like: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    return [like.new_empty(size) for size in sizes]


def _check(
    token_logps: Tensor,
    offsets: Tensor,
    per_sequence: Tensor | None,
    ref_logps: Tensor | None,
    ref_token_logps: Tensor | None,
) -> int:
    """The number of pairs, if everything fits together."""
    sequences = offsets.numel() - 1
    if token_logps.dtype != torch.float32 or offsets.dtype != torch.int64:
        raise ValueError(
            f"expected token_logps in fp32 and offsets in int64, got {token_logps.dtype} and "
            f"{offsets.dtype}"
        )
    if sequences < 0 or sequences % 2:
        raise ValueError(f"offsets: expected 2B + 1 entries, got {offsets.numel()}")
    if ref_logps is not None and ref_token_logps is not None:
        raise ValueError("expected ref_logps or ref_token_logps, got both")
    expected = (
        ("ref_logps", ref_logps, sequences),
        ("ref_token_logps", ref_token_logps, token_logps.numel()),
        ("completion_lengths or advantages", per_sequence, sequences),
    )
    for name, tensor, size in expected:
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"{name}: expected shape [{size}], got {list(tensor.shape)}")
    for tensor in (token_logps, offsets, per_sequence, ref_logps, ref_token_logps):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError("expected contiguous tensors, got one with gaps")
    return sequences // 2
