"""The backward pass of :mod:`fastdaa.compiled_loss`: gradients from what the forward pass kept.

An operator of its own, so that each gradient is made in the dtype of its tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.compiled_logps import HeadSettings
from fastdaa.compiled_operators import no_slopes, present, present_fake, wide_dtype
from fastdaa.compiled_sizes import HOST_READS
from fastdaa.gradient_sums import HeadSums, dtypes_of
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.kept import Waiting, waiting_gradients
from fastdaa.kept_products import KeptGradients
from fastdaa.losses import Objective
from fastdaa.plan_call import plan_call
from fastdaa.recompute import head_gradients
from fastdaa.row_passes import RowState
from fastdaa.tiles import Logits
from fastdaa.waiting_rows import WaitingRows


class Saved(NamedTuple):
    """What forward keeps for backward; without rows where the plan keeps something else."""

    coefficients: Tensor
    """``[N]`` derivatives of the loss by the log-probs."""
    factors: Tensor
    """``[N]`` that goes with ``dz``, as the next."""
    own: Tensor
    """``[N]`` entries of the gradient at the targets."""
    active: Tensor
    """``[a]`` rows of ``dz``, if they are not all."""
    dz: Tensor
    """``[a, c]`` gradients of the logits without coefficients, see :mod:`fastdaa.kept`."""
    m: Tensor
    """``[N]``, to compute the logits again, of the columns that ``dz`` does not have if it has
    any."""
    log_s: Tensor
    """``[N]`` that goes with ``m``."""
    hidden: Tensor
    """``[N, D]`` gradient of the hidden states, of a frozen head without ``coefficients``, which
    are there, too: this and the next are :class:`fastdaa.waiting_rows.WaitingRows`."""
    hidden_scales: Tensor
    """``[N]`` that goes with it."""
    weight: Tensor
    """``[V, D]`` gradient of the weight, as the hidden states' is."""
    weight_scales: Tensor
    """``[V]`` that goes with it."""
    bias: Tensor
    """``[V]`` gradient of the bias, wide."""

    @staticmethod
    def nothing(rows: Tensor, weight: Tensor, operand: torch.dtype) -> Saved:
        """All of them without rows."""

        def empty(*columns: int, dtype: torch.dtype | None = None) -> Tensor:
            return rows.new_empty((0, *columns), dtype=dtype or wide_dtype(operand))

        return Saved(
            empty(), empty(), empty(), empty(dtype=torch.int64),
            empty(weight.shape[0], dtype=operand), empty(), empty(),
            *no_slopes(rows, operand), *no_slopes(weight, operand), empty(),
        )  # fmt: skip


@torch.library.custom_op("fastdaa::pair_loss_gradients", mutates_args=(), tags=HOST_READS)
def pair_loss_gradients(
    grad_loss: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    positions: Tensor,
    logps: Tensor,
    coefficients: Tensor,
    factors: Tensor,
    own: Tensor,
    active: Tensor,
    dz: Tensor,
    m: Tensor,
    log_s: Tensor,
    hidden_sum: Tensor,
    hidden_scales: Tensor,
    weight_sum: Tensor,
    weight_scales: Tensor,
    bias_sum: Tensor,
    objective: str,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    shard: list[int] | None,
    group: str | None,
    operand: torch.dtype,
    impl: str,
    engine: str,
    max_bytes: int | None,
    stats: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias from :class:`Saved`; empty where not wanted."""
    by_hidden, by_weight = (
        WaitingRows(hidden_sum, hidden_scales), WaitingRows(weight_sum, weight_scales),
    )  # fmt: skip
    wants = wanted[0], wanted[1], wanted[2]
    if hidden_sum.numel() and coefficients.numel():
        scaled = coefficients * grad_loss
        slopes = by_hidden.scattered(scaled, hidden_states.dtype, positions, len(hidden_states))
        return present((slopes, None, None), hidden_states)
    if any(total.numel() for total in (hidden_sum, weight_sum, bias_sum)):
        sums = HeadSums(
            by_hidden if wants[0] else None, by_weight if wants[1] else None,
            bias_sum if wants[2] else None,
        )  # fmt: skip
        dtypes = dtypes_of(hidden_states, weight, bias)
        grads = sums.scaled(grad_loss, dtypes, positions, len(hidden_states))
        return present(grads, hidden_states)
    head = HeadSettings(softcap, logit_scale, temperature, shard, group).head(weight, bias)
    # What is here says which way forward took, which has seen the lengths of pairs.
    kept_any = factors.shape[0] > 0
    plan = plan_call(
        hidden_states, head, wanted=(wanted[0], wanted[1] or wanted[2]), loss_inside=True,
        coupled=kept_any, sparse=Objective.by_key(objective).sparse, tokens=len(positions),
        stats=stats, operand=operand, impl=impl if kept_any else "recompute", engine=engine,
        max_bytes=max_bytes,
    )  # fmt: skip
    logits = selected_logits(hidden_states, head, operand, plan, positions)
    scaled, state = coefficients * grad_loss, RowState(m, log_s, logps)
    if kept_any:
        some = active if dz.shape[0] < len(positions) else None
        kept = KeptGradients(dz[:, : weight.shape[0]], factors, own, some)
        waiting = Waiting(scaled, state, kept)
        grads = waiting_gradients(logits, targets, waiting, plan, wants)
    else:
        grads = head_gradients(logits, targets, scaled, state, plan, wants)
    rows, *others = grads
    if rows is not None:
        rows = hidden_states.new_zeros(hidden_states.shape).index_add_(0, positions, rows)
    return present((rows, others[0], others[1]), hidden_states)


def selected_logits(
    hidden_states: Tensor, head: LmHead, operand: torch.dtype, plan: HeadPlan, positions: Tensor
) -> Logits:
    """Those of the rows at ``positions [N]`` of ``[P, D]``: copied here where gradients of the
    logits are kept until backward, else as they are needed."""
    if plan.kept_whole:
        return Logits(hidden_states.index_select(0, positions), head, operand, plan.engine)
    return Logits(hidden_states, head, operand, plan.engine, positions)


@pair_loss_gradients.register_fake
def _(
    grad_loss: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return present_fake((hidden_states, weight, bias), rest[-1])
