"""Log-probabilities of targets and row statistics from the product's own fp32 accumulator (1U).

No tile of logits reaches memory. A program holds ``[BLOCK_N, BLOCK_V]`` logits in registers, folds
them into a running state of its rows and goes on to the next columns; each work item (row block,
vocabulary split) writes its state once, and a second small kernel merges the splits in their order.
No atomics: results are bitwise repeatable, and since the splits do not depend on N, a row has the
same bits in every batch. The derivation is in the comments of ``_fold_tile``.

Checked in Triton's interpreter and by compiling ahead of time; it has not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdaa.kernels.elementary import FLOOR, exp
from fastdaa.kernels.logit_tile import (
    _final_logits,
    _finite,
    _product,
    _shift,
    _split_columns,
    _without_padding,
    _work_item,
)
from fastdaa.kernels.merge_splits import (
    SCORE_FIELDS,
    STATS_FIELDS,
    RowStatistics,
    merge_splits,
)
from fastdaa.kernels.operands import (
    check_operands,
    multiprocessors,
    on_device,
    operand,
    tile_factors,
)
from fastdaa.kernels.score_configs import (
    SCORE_CONFIGS,
    TileConfig,
    tile_config,
)


# The number of rows changes from batch to batch, and needs no code of its own.
@triton.jit(do_not_specialize=["N"])
def _score_tiles_kernel(
    hidden,  # [N, D] pointer or descriptor
    weight,  # [V, D] pointer or descriptor
    bias_ptr,  # [V] or None
    targets_ptr,  # [N] int64
    states_ptr,  # [splits, fields, N] fp32
    N,
    V,
    D,
    stride_hn,
    stride_wv,
    inner,
    outer,
    SPLIT_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    PARTS: tl.constexpr,
    STATS: tl.constexpr,
    EVEN_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_V // PARTS
    row_blocks = tl.cdiv(N, BLOCK_N)
    splits = tl.cdiv(V, SPLIT_V)
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = _work_item(item, row_blocks, splits, GROUP_N)
        offs_n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = offs_n < N
        targets = tl.load(targets_ptr + offs_n, mask=inside, other=-1).to(tl.int32)
        m = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        target_logit = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        weighted = tl.zeros((BLOCK_N,), tl.float32)
        squares = tl.zeros((BLOCK_N,), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        last = tl.minimum((split + 1) * SPLIT_V, V)
        for column in range(split * SPLIT_V, last, BLOCK_V):
            found = (targets >= column) & (targets < column + BLOCK_V)
            # Few tiles hold a target or padding, and looking for them costs ten instructions a
            # logit. Other rows of such a tile keep their logits, and so their bits.
            special = (tl.max(found.to(tl.int32), axis=0) > 0) | (column + BLOCK_V > V)
            acc = _product(
                hidden, weight, row_block * BLOCK_N, column, N, V, D, stride_hn, stride_wv,
                BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, USE_TMA,
            )  # fmt: skip
            parts = _split_columns(acc, PARTS)
            for i in tl.static_range(PARTS):
                first = column + i * WIDTH
                columns = first + tl.arange(0, WIDTH)
                z = _final_logits(parts[i], bias_ptr, columns, V, inner, outer)
                if special:
                    z, part_total, target_logit = _take_target(
                        z, columns, targets, first, V, target_logit, STATS
                    )
                    total += part_total
                elif STATS:
                    total += tl.sum(z, axis=1)
                m, s, weighted, squares = _fold_tile(z, m, s, weighted, squares, STATS)
        fields = 6 if STATS else 3
        out_ptrs = states_ptr + split.to(tl.int64) * fields * N + offs_n
        field = tl.cast(N, tl.int64)
        tl.store(out_ptrs, m, mask=inside)
        tl.store(out_ptrs + field, s, mask=inside)
        tl.store(out_ptrs + 2 * field, target_logit, mask=inside)
        if STATS:
            tl.store(out_ptrs + 3 * field, weighted, mask=inside)
            tl.store(out_ptrs + 4 * field, squares, mask=inside)
            tl.store(out_ptrs + 5 * field, total, mask=inside)


@triton.jit
def _take_target(
    z,  # [BLOCK_N, BLOCK_V]
    columns,  # [BLOCK_V]
    targets,  # [BLOCK_N]
    first,  # of columns
    V,
    target_logit,  # [BLOCK_N]
    STATS: tl.constexpr,
):
    """The logits without targets and padding (``-inf``), their row sums, and the targets' logits.

    A target outside the vocabulary is not found among the padded columns.
    """
    is_target = columns[None, :] == targets[:, None]
    own = tl.sum(tl.where(is_target, z, 0.0), axis=1)
    here = (targets >= first) & (targets < tl.minimum(first + z.shape[1], V))
    z = _without_padding(z, columns, V)
    total = tl.zeros_like(own)
    if STATS:
        total = tl.sum(tl.where((columns < V)[None, :], z, 0.0), axis=1)
    return tl.where(is_target, -float("inf"), z), total, tl.where(here, own, target_logit)


@triton.jit
def _fold_tile(
    others,  # [BLOCK_N, BLOCK_V]
    m,
    s,
    weighted,
    squares,
    STATS: tl.constexpr,
):
    """Fold a tile of logits into the state of its rows, all ``[BLOCK_N]``.

    The target's logit is -inf here, it stays out of the state: where it is the maximum, its 1 would
    swallow the rest of the sum, and a confident token would have a log-prob and a gradient of 0.
    With y = z - m over the other columns, the state is

        m = max z,  s = sum e^y,  weighted = sum y e^y,  squares = sum e^2y

    and a new maximum, d = old m - new m <= 0, turns y into y + d:

        s -> e^d s,  weighted -> e^d (weighted + d s),  squares -> e^2d squares
    """
    new_m = tl.maximum(m, tl.max(others, axis=1))
    d = _shift(m, new_m)
    y = others - _finite(new_m)[:, None]
    e = exp(y)
    if STATS:
        # exp(FLOOR) is 0; it keeps 0 * -inf out of the sum.
        weighted = exp(d) * (weighted + d * s) + tl.sum(tl.maximum(y, FLOOR) * e, axis=1)
        squares = exp(2.0 * d) * squares + tl.sum(e * e, axis=1)
    s = exp(d) * s + tl.sum(e, axis=1)
    return new_m, s, weighted, squares


def score_tokens(
    hidden_states: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N] int64
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    stats: bool = False,
    config: TileConfig | None = None,
    programs: int | None = None,
) -> RowStatistics:
    """Score every target under ``cap(logit_scale * (h @ weight.T + bias)) / temperature``.

    Args:
        hidden_states, weight: bf16, fp16 or fp32, both the same, with contiguous rows.
        targets: token ids in ``[0, V)``; another id gives NaN.
        bias: any floating dtype.
        stats: also entropy, top-1 hits, mean logit and log of the sum of squared probabilities.
        config: tile shapes; None for the table's entry of this device.
        programs: programs of the persistent grid; None for as many as the configuration says.

    Returns:
        fp32 vectors. Memory beyond them: ``4 * N * fields * ceil(V / split_v)`` bytes with 3
        fields, 6 with statistics.

    Raises:
        ValueError: dtypes or layouts other than the above.
    """
    check_operands(hidden_states, weight)
    (N, D), V = hidden_states.shape, weight.shape[0]
    factors = tile_factors(logit_scale, softcap, temperature)
    long = stats or bias is not None or factors != (None, None)
    config = tile_config(SCORE_CONFIGS, long, (hidden_states, weight), config)
    splits = triton.cdiv(V, config.split_v)
    fields = STATS_FIELDS if stats else SCORE_FIELDS
    shape = (splits, fields, N)
    states = torch.empty(shape, dtype=torch.float32, device=hidden_states.device)
    if N == 0:
        return merge_splits(states, targets, V)
    targets = targets.contiguous()
    bias = bias if bias is None else bias.contiguous()
    items = splits * triton.cdiv(N, config.block_n)
    programs = programs or config.programs * multiprocessors(hidden_states.device)
    with on_device(hidden_states):
        _score_tiles_kernel[(min(items, programs),)](
            operand(hidden_states, config.block_n, config.block_d, config.tma),
            operand(weight, config.block_v, config.block_d, config.tma),
            bias, targets, states,
            N, V, D, hidden_states.stride(0), weight.stride(0), *factors,
            config.split_v, config.block_n, config.block_v, config.block_d, config.group_n,
            config.parts, stats, D % config.block_d == 0, config.tma,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg,
            enable_fp_fusion=True,
        )  # fmt: skip
    return merge_splits(states, targets, V)
