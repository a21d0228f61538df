"""1U: statistics of every scored token in one pass over the vocabulary, no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdaa.engines import state_and_values
from fastdaa.fused_check import check_rows
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.outputs import STATISTICS, TokenStats
from fastdaa.row_passes import RowState
from fastdaa.tiles import Logits, blocks, without_autocast

_Scores = tuple[RowState, TokenStats | None]


@torch.no_grad()
def score(
    hidden_states: Tensor,
    head: LmHead,
    targets: Tensor,
    plan: HeadPlan,
    *,
    stats: bool = False,
    operand: torch.dtype | None = None,
    positions: Tensor | None = None,
) -> _Scores:
    """Statistics ``[N]`` of all rows, and those that only metrics need if ``stats``.

    ``operand`` is the dtype of the factors where autocast was seen elsewhere; ``positions`` as in
    :class:`fastdaa.tiles.Logits`.
    """
    fused = plan.engine == "fused"
    logits = Logits(hidden_states, head, operand, "torch" if fused else plan.engine, positions)
    if fused:
        return _fused(logits, targets, plan.block_rows, stats)
    with without_autocast(hidden_states.device):
        weight = logits.columns(slice(0, head.width))
        results = [
            logits.statistics(logits.rows(rows), weight, targets[rows], stats)
            for rows in blocks(logits.tokens, plan.block_rows)
        ]
    return _joined(results, hidden_states.new_zeros(0, dtype=logits.wide), stats)


def _fused(logits: Logits, targets: Tensor, block_rows: int, stats: bool) -> _Scores:
    """From the accumulator of the product itself: no logits in memory, Triton's kernel."""
    head, operand = logits.head, logits.operand
    if operand == torch.float64 or head.shard is not None:
        got = operand if head.shard is None else "a slice of the vocabulary"
        raise ValueError(f"engine='fused': expected fp16, bf16 or fp32 and all of V, got {got}")
    from fastdaa.kernels.score import score_tokens

    weight = head.weight.to(operand).contiguous()
    results: list[_Scores] = []
    for rows in blocks(logits.tokens, block_rows):
        scores = score_tokens(
            logits.rows(rows).contiguous(), weight, targets[rows], bias=head.bias,
            logit_scale=head.logit_scale, softcap=head.softcap, temperature=head.temperature,
            stats=stats,
        )  # fmt: skip
        results.append(state_and_values(scores))
        if len(results) == 1:
            _check(logits, weight, targets[rows], results[0], stats)
    return _joined(results, weight.new_zeros(0, dtype=torch.float32), stats)


def _check(logits: Logits, weight: Tensor, targets: Tensor, got: _Scores, stats: bool) -> None:
    """The first block of a call, once for every variant of the kernel."""
    from fastdaa.kernels.operands import tile_factors

    def named(scores: _Scores) -> dict[str, Tensor]:
        state, values = scores
        return {
            "log-probs": state.logps,
            **({} if values is None else {"entropies": values.entropy}),
        }

    def plain(picked: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        with without_autocast(weight.device):
            hidden = logits.pick(picked).rows(slice(0, picked.shape[0]))
            some = targets[picked]
            # The kernel gives NaN for other ids, at which plain torch fails.
            known = (some >= 0) & (some < weight.shape[0])
            scores = logits.statistics(hidden, weight, some.where(known, 0), stats)
        return named(scores), scores[0].m.where(known, torch.inf)

    head = logits.head
    factors = tile_factors(head.logit_scale, head.softcap, head.temperature)
    variant = (
        "score", logits.operand, weight.shape, stats, head.bias is None,
        tuple(factor is None for factor in factors),
    )  # fmt: skip
    check_rows(weight.device, variant, named(got), plain)


def _joined(results: list[_Scores], empty: Tensor, stats: bool) -> _Scores:
    """Those of all rows from those of blocks."""
    states, values = [state for state, _ in results], [value for _, value in results]
    return RowState(*join(states, 3, empty)), statistics_of(values, empty) if stats else None


def statistics_of(values: Sequence[TokenStats | None], empty: Tensor) -> TokenStats:
    """Those of blocks one after the other."""
    return TokenStats(*join(values, STATISTICS, empty))


def join(parts: Sequence[Any], fields: int, empty: Tensor) -> list[Tensor]:
    """Named tuples of vectors to one vector a field; ``empty`` if there are none."""
    return [torch.cat([part[field] for part in parts] or [empty]) for field in range(fields)]
