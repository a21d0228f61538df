"""Entropies and their gradients, tile by tile: what :mod:`fastdaa.entropy` computes.

With ``H = -sum_v p_v log p_v`` the gradient by the final logits is ``-p_v (log p_v + H)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.frozen import slopes_of
from fastdaa.gradient_sums import Gradients
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.plan_call import plan_call
from fastdaa.recompute import head_gradients
from fastdaa.row_passes import EntropyTerm, RowState
from fastdaa.score import score
from fastdaa.tiles import GradientFactor, Logits, blocks, product, without_autocast
from fastdaa.waiting_rows import WaitingRows


def plan_entropy(
    hidden_states: Tensor,
    head: LmHead,
    *,
    impl: str,
    engine: str,
    max_bytes: int | None,
    wanted: tuple[bool, bool] | None = None,
    operand: torch.dtype | None = None,
) -> HeadPlan:
    """The plan of entropies of ``[N, D]`` hidden states; see :mod:`fastdaa.plan_call`."""
    return plan_call(
        hidden_states, head, wanted=wanted, stats=True, entropy=True, operand=operand, impl=impl,
        engine=engine, max_bytes=max_bytes,
    )  # fmt: skip


def entropies(
    hidden_states: Tensor, head: LmHead, plan: HeadPlan, operand: torch.dtype
) -> tuple[RowState, Tensor]:
    """Statistics of all rows, and their entropies ``[N]``."""
    state, stats = score(
        hidden_states, head, _any_targets(hidden_states), plan, stats=True, operand=operand
    )
    assert stats is not None
    return state, stats.entropy


def entropies_and_slopes(
    hidden_states: Tensor, head: LmHead, plan: HeadPlan, operand: torch.dtype
) -> tuple[Tensor, WaitingRows]:
    """Entropies ``[N]`` and their slopes by the hidden states, ``[N, D]``."""
    logits = Logits(hidden_states, head, operand, plan.engine)
    slopes = slopes_of(logits)
    values = torch.empty_like(slopes.scales)
    ones, targets = torch.ones_like(values), _any_targets(hidden_states)
    with without_autocast(hidden_states.device):
        factor = GradientFactor(logits, ones)
        scaled, weight = factor.scaled(ones), logits.columns(slice(0, head.width))
        for rows in blocks(values.shape[0], plan.block_rows):
            tile = logits.row_tile(logits.rows(rows), weight, slice(0, head.width))
            state, stats = tile.statistics(targets[rows], stats=True, keep=True)
            assert stats is not None
            values[rows] = stats.entropy
            dz = tile.entropy_gradient(state, EntropyTerm(stats.entropy, scaled[rows]))
            del tile
            dz = dz.to(logits.operand)
            slopes.keep(rows, factor.restore(product(dz, weight, slopes.place(rows))))
            del dz  # before the next ones are made
    return values, slopes


def entropy_gradients(
    logits: Logits,
    coefficients: Tensor,
    values: Tensor,
    m: Tensor,
    log_s: Tensor,
    plan: HeadPlan,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of ``sum(coefficients * values)``, the entropies, from statistics of the rows."""
    # Their gradient does not read the log-probs of targets.
    return head_gradients(
        logits, _any_targets(logits.hidden_states), None, RowState(m, log_s, values), plan, wanted,
        entropy=EntropyTerm(values, coefficients),
    )  # fmt: skip


def _any_targets(hidden_states: Tensor) -> Tensor:
    """Statistics of rows come with the log-prob of a token; which one does not matter."""
    return hidden_states.new_zeros(hidden_states.shape[0], dtype=torch.int64)
