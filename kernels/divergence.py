"""Exact divergences between two heads' next-token distributions, token by token.

Two accumulators a tile, policy and reference, so each logit of both heads is computed once and none
reaches memory. With ``y = z - m`` for the policy, ``y'`` for the reference, ``e = exp(y)`` and
``s = sum e``:

    KL(policy || ref) = sum_v e_v (y_v - y'_v) / s - log s + log s'

which one pass can sum (2U), and the same with the primes exchanged. The Jensen-Shannon divergence
is no such sum: ``log (p + q)`` needs both normalisers first, so it takes a second pass (2U more).

Forward only. The gradients by the policy's final logits, with ``l = log p`` and ``l' = log q``, are

    KL(p || q): p_v (l_v - l'_v - KL)       KL(q || p): p_v - q_v
    JS:         p_v (l_v - log((p_v + q_v) / 2) - KL(p || (p + q) / 2)) / 2

and go through the slope of the logits into the two gradient products like any other dlogits.

Checked in Triton's interpreter and by compiling ahead of time; it has not run on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.elementary import exp
from fastdaa.kernels.jensen_shannon import sum_js
from fastdaa.kernels.logit_tile import (
    _both_products,
    _final_logits,
    _finite,
    _shift,
    _without_padding,
    _work_item,
)
from fastdaa.kernels.operands import (
    check_operands,
    multiprocessors,
    on_device,
    operand,
    tile_factors,
)
from fastdaa.kernels.score_configs import (
    DIVERGENCE_CONFIGS,
    DIVERGENCE_FIELDS,
    TileConfig,
    tile_config,
)

_MERGE_BLOCK = 128


class HeadOptions(NamedTuple):
    """What a head does to ``hidden @ weight.T + bias``: ``cap(logit_scale * z) / temperature``."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class TokenDivergences(NamedTuple):
    """All ``[N]`` fp32, in nats; the absolute error is a few roundings of the logits."""

    kl: Tensor
    """``KL(policy || ref)``; infinite where the reference excludes a token that the policy does
    not."""
    reverse_kl: Tensor
    """``KL(ref || policy)``."""
    js: Tensor | None
    """Jensen-Shannon divergence, at most ln 2; None unless asked for."""


@triton.jit(do_not_specialize=["N"])
def _sum_gaps_kernel(
    hidden,  # [N, D] pointer or descriptor
    weight,  # [V, D] pointer or descriptor
    bias_ptr,  # [V] or None
    ref_hidden,  # [N, ref_D] pointer or descriptor
    ref_weight,  # [V, ref_D] pointer or descriptor
    ref_bias_ptr,  # [V] or None
    states_ptr,  # [splits, 6, N] fp32
    N,
    V,
    D,
    ref_D,
    inner,
    outer,
    ref_inner,
    ref_outer,
    SPLIT_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    splits = tl.cdiv(V, SPLIT_V)
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = _work_item(item, row_blocks, splits, GROUP_N)
        m = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        gap = tl.zeros((BLOCK_N,), tl.float32)
        ref_m = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        ref_s = tl.zeros((BLOCK_N,), tl.float32)
        ref_gap = tl.zeros((BLOCK_N,), tl.float32)
        last = tl.minimum((split + 1) * SPLIT_V, V)
        for column in range(split * SPLIT_V, last, BLOCK_V):
            parts, ref_parts = _both_products(
                hidden, weight, ref_hidden, ref_weight, row_block * BLOCK_N, column, N, V, D, ref_D,
                BLOCK_N, BLOCK_V, BLOCK_D, PARTS, EVEN_D, USE_TMA,
            )  # fmt: skip
            for i in tl.static_range(PARTS):
                columns = column + i * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
                z = _final_logits(parts[i], bias_ptr, columns, V, inner, outer)
                ref_z = _final_logits(ref_parts[i], ref_bias_ptr, columns, V, ref_inner, ref_outer)
                z, ref_z = _without_padding(z, columns, V), _without_padding(ref_z, columns, V)
                m, s, gap, ref_m, ref_s, ref_gap = _fold_gaps(
                    z, ref_z, m, s, gap, ref_m, ref_s, ref_gap
                )
        offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = offs_n < N
        field = tl.cast(N, tl.int64)
        out_ptrs = states_ptr + split.to(tl.int64) * 6 * N + offs_n
        tl.store(out_ptrs, m, mask=inside)
        tl.store(out_ptrs + field, s, mask=inside)
        tl.store(out_ptrs + 2 * field, gap, mask=inside)
        tl.store(out_ptrs + 3 * field, ref_m, mask=inside)
        tl.store(out_ptrs + 4 * field, ref_s, mask=inside)
        tl.store(out_ptrs + 5 * field, ref_gap, mask=inside)


@triton.jit
def _fold_gaps(z, ref_z, m, s, gap, ref_m, ref_s, ref_gap):
    """Fold a tile of both heads' logits into ``gap = sum e (y - y')`` and ``sum e' (y' - y)``."""
    new_m = tl.maximum(m, tl.max(z, axis=1))
    new_ref_m = tl.maximum(ref_m, tl.max(ref_z, axis=1))
    d, ref_d = _shift(m, new_m), _shift(ref_m, new_ref_m)
    y = z - _finite(new_m)[:, None]
    ref_y = ref_z - _finite(new_ref_m)[:, None]
    e, ref_e = exp(y), exp(ref_y)
    difference = y - ref_y  # NaN where both heads exclude a column: e and ref_e are 0 there
    gap = _move_gap(gap, s, d, ref_d) + tl.sum(tl.where(e > 0, e * difference, 0.0), axis=1)
    ref_gap = _move_gap(ref_gap, ref_s, ref_d, d) - tl.sum(
        tl.where(ref_e > 0, ref_e * difference, 0.0), axis=1
    )
    s = exp(d) * s + tl.sum(e, axis=1)
    ref_s = exp(ref_d) * ref_s + tl.sum(ref_e, axis=1)
    return new_m, s, gap, new_ref_m, ref_s, ref_gap


@triton.jit
def _move_gap(gap, s, d, other_d):
    """``sum e (y - y')`` when y becomes y + d and y' becomes y' + other_d; infinity stays."""
    moved = exp(d) * (gap + (d - other_d) * s)
    return tl.where(gap == float("inf"), gap, moved)


@triton.jit(do_not_specialize=["N"])
def _merge_gaps_kernel(
    states_ptr,  # [splits, 6, N] fp32
    kl_ptr,  # [N]
    reverse_kl_ptr,  # [N]
    rows_ptr,  # [4, N]: m, log_s, ref_m, ref_log_s
    N,
    splits,
    BLOCK: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs_n < N
    field = tl.cast(N, tl.int64)
    m = tl.full((BLOCK,), -float("inf"), tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    gap = tl.zeros((BLOCK,), tl.float32)
    ref_m = tl.full((BLOCK,), -float("inf"), tl.float32)
    ref_s = tl.zeros((BLOCK,), tl.float32)
    ref_gap = tl.zeros((BLOCK,), tl.float32)
    in_ptrs = states_ptr + offs_n
    for _ in range(splits):
        part_m = tl.load(in_ptrs, mask=inside, other=0.0)
        part_s = tl.load(in_ptrs + field, mask=inside, other=1.0)
        part_gap = tl.load(in_ptrs + 2 * field, mask=inside, other=0.0)
        part_ref_m = tl.load(in_ptrs + 3 * field, mask=inside, other=0.0)
        part_ref_s = tl.load(in_ptrs + 4 * field, mask=inside, other=1.0)
        part_ref_gap = tl.load(in_ptrs + 5 * field, mask=inside, other=0.0)
        new_m, new_ref_m = tl.maximum(m, part_m), tl.maximum(ref_m, part_ref_m)
        d, part_d = _shift(m, new_m), _shift(part_m, new_m)
        ref_d, part_ref_d = _shift(ref_m, new_ref_m), _shift(part_ref_m, new_ref_m)
        gap = _move_gap(gap, s, d, ref_d) + _move_gap(part_gap, part_s, part_d, part_ref_d)
        ref_gap = _move_gap(ref_gap, ref_s, ref_d, d) + _move_gap(
            part_ref_gap, part_ref_s, part_ref_d, part_d
        )
        s = exp(d) * s + exp(part_d) * part_s
        ref_s = exp(ref_d) * ref_s + exp(part_ref_d) * part_ref_s
        m, ref_m = new_m, new_ref_m
        in_ptrs += 6 * field
    log_s, ref_log_s = tl.log(s), tl.log(ref_s)
    tl.store(kl_ptr + offs_n, gap / s - log_s + ref_log_s, mask=inside)
    tl.store(reverse_kl_ptr + offs_n, ref_gap / ref_s - ref_log_s + log_s, mask=inside)
    tl.store(rows_ptr + offs_n, _finite(m), mask=inside)
    tl.store(rows_ptr + field + offs_n, log_s, mask=inside)
    tl.store(rows_ptr + 2 * field + offs_n, _finite(ref_m), mask=inside)
    tl.store(rows_ptr + 3 * field + offs_n, ref_log_s, mask=inside)


def token_divergences(
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    ref_hidden_states: Tensor,  # [N, D']
    ref_weight: Tensor,  # [V, D']
    *,
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    options: HeadOptions | None = None,
    ref_options: HeadOptions | None = None,
    js: bool = False,
    config: TileConfig | None = None,
    programs: int | None = None,
) -> TokenDivergences:
    """Divergences of the next-token distributions at ``N`` positions, over one vocabulary.

    Args:
        hidden_states, weight, ref_hidden_states, ref_weight: contiguous, all bf16, fp16 or fp32.
        options, ref_options: scale, softcap and temperature of the heads; None for none of them.
        js: also the Jensen-Shannon divergence, at twice the cost.
        config: tile shapes; None for the table's entry of this device.
        programs: programs of the persistent grid; None for as many as the configuration says.

    Raises:
        ValueError: dtypes, shapes or layouts other than the above.
    """
    check_operands(hidden_states, weight)
    check_operands(ref_hidden_states, ref_weight, "ref_")
    _check_pair(hidden_states, weight, ref_hidden_states, ref_weight)
    (N, D), V, ref_D = hidden_states.shape, weight.shape[0], ref_hidden_states.shape[1]
    operands = (hidden_states, weight, ref_hidden_states, ref_weight)
    heads = (options or HeadOptions(), ref_options or HeadOptions())
    factors = tuple(factor for head in heads for factor in tile_factors(*head))
    plain = bias is None and ref_bias is None and factors == (None,) * 4
    config = tile_config(DIVERGENCE_CONFIGS, js or not plain, operands, config)
    kl, reverse_kl = (hidden_states.new_empty(N, dtype=torch.float32) for _ in range(2))
    if N == 0:
        return TokenDivergences(kl, reverse_kl, torch.empty_like(kl) if js else None)
    splits = triton.cdiv(V, config.split_v)
    states, rows = kl.new_empty(splits, DIVERGENCE_FIELDS, N), kl.new_empty(4, N)
    blocks = (config.block_n, config.block_v) * 2
    tiles = [
        operand(tensor, block, config.block_d, config.tma)
        for tensor, block in zip(operands, blocks, strict=True)
    ]
    biases = [b if b is None else b.contiguous() for b in (bias, ref_bias)]
    inputs = (*tiles[:2], biases[0], *tiles[2:], biases[1])
    sizes = (N, V, D, ref_D, *factors)
    constants = (
        config.split_v, config.block_n, config.block_v, config.block_d, config.group_n,
        config.parts, D % config.block_d == 0 and ref_D % config.block_d == 0, config.tma,
    )  # fmt: skip
    launch = {
        "num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.maxnreg,
        "enable_fp_fusion": True,
    }  # fmt: skip
    items = splits * triton.cdiv(N, config.block_n)
    grid = (min(items, programs or config.programs * multiprocessors(kl.device)),)
    merge_grid = (triton.cdiv(N, _MERGE_BLOCK),)
    with on_device(kl):
        _sum_gaps_kernel[grid](*inputs, states, *sizes, *constants, **launch)
        _merge_gaps_kernel[merge_grid](
            states, kl, reverse_kl, rows, N, splits, _MERGE_BLOCK, enable_fp_fusion=True
        )
        del states  # before the next ones are made
        divergence = sum_js(grid, inputs, rows, sizes, constants, launch) if js else None
    return TokenDivergences(kl, reverse_kl, divergence)


def _check_pair(
    hidden_states: Tensor, weight: Tensor, ref_hidden_states: Tensor, ref_weight: Tensor
) -> None:
    if ref_hidden_states.shape[0] != hidden_states.shape[0] or len(ref_weight) != len(weight):
        raise ValueError(
            "expected the same positions and vocabulary for both heads, got "
            f"{hidden_states.shape[0]} and {ref_hidden_states.shape[0]} positions, "
            f"{len(weight)} and {len(ref_weight)} tokens"
        )
    tensors = (hidden_states, weight, ref_hidden_states, ref_weight)
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError(f"expected one device, got {[str(tensor.device) for tensor in tensors]}")
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"expected one dtype, got {[tensor.dtype for tensor in tensors]}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("expected contiguous hidden states and weights, got one with gaps")
