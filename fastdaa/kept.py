"""3U with bf16 factors: gradients of logits wait, without the loss's coefficients, for backward.

The gradient of the loss itself is known by then, so the weight's gradient needs no fp32 sum, and
each entry of the results is rounded once to the dtype of its tensor
(:mod:`fastdaa.kept_products`). Where memory holds only the gradients of some columns, backward
computes the logits of the others again, 3U to 4U. In fp16, rounding ``c * H`` costs more than
rounding ``c * dz`` where logits are small, so fp16 is left to chunks of logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.chunks import Chunk, ChunkObjective
from fastdaa.first_order import first_order
from fastdaa.gradient_sums import Gradients
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.kept_products import FirstColumns, KeptGradients, leave_out
from fastdaa.outputs import TokenStats
from fastdaa.recompute import head_gradients
from fastdaa.row_passes import RowState
from fastdaa.tiles import Logits, without_autocast
from fastdaa.unscaled import Unscaled


class Waiting(NamedTuple):
    """What waits for the backward pass."""

    coefficients: Tensor
    """``[N]`` derivatives of the loss by the log-probs."""
    state: RowState
    """``[N]``, to compute logits again; of empty ``m`` and ``log_s`` where there is no need."""
    kept: KeptGradients


class Kept(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, targets, head, plan, chunk, objective, pairs, stats)``.

    The chunk is the whole batch. Returns what :class:`fastdaa.single_pass.SinglePass` does.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        head: LmHead, plan: HeadPlan, chunk: Chunk, objective: ChunkObjective,
        pairs: int, stats: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Loss, coefficients, and the gradients of the logits without them."""
        logits = Logits(hidden_states, head, engine=plan.engine)
        (losses, logps, *values), waiting = keep_gradients(
            logits, targets, plan, chunk, objective, stats
        )
        coefficients, state, kept = waiting
        ctx.save_for_backward(hidden_states, weight, bias, targets, coefficients, *state, *kept)
        ctx.plan, ctx.operand = plan, logits.operand
        ctx.options = head.settings()
        logps = logps.clone()  # the caller may change it, backward reads the other
        ctx.mark_non_differentiable(losses, logps, *values)
        return losses.sum() / pairs, losses, logps, *values

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Both products; what was saved stays as it is, so that backward can run again."""
        hidden, weight, bias, targets, coefficients, *saved = ctx.saved_tensors
        logits = Logits(
            hidden, replace(ctx.options, weight=weight, bias=bias), ctx.operand, ctx.plan.engine
        )
        state, kept = RowState(*saved[:3]), KeptGradients(*saved[3:])
        waiting = Waiting(coefficients * grad_loss, state, kept)
        grads = waiting_gradients(logits, targets, waiting, ctx.plan, ctx.needs_input_grad[:3])
        return *grads, None, None, None, None, None, None, None


def keep_logps(
    logits: Logits, targets: Tensor, plan: HeadPlan, stats: bool = False
) -> tuple[list[Tensor], RowState, KeptGradients]:
    """Statistics ``[N]``, log-probs and what computes logits again (empty where all gradients
    are kept), and the gradients."""
    with without_autocast(logits.hidden_states.device):
        made = Unscaled(logits, targets, plan, targets.shape[0], stats)
        logps = made.make(slice(0, targets.shape[0]))
    (m, log_s, _), values = made.joined()
    return values, RowState(m, log_s, logps), made.kept


def keep_gradients(
    logits: Logits, targets: Tensor, plan: HeadPlan, chunk: Chunk, objective: ChunkObjective,
    stats: bool,
) -> tuple[list[Tensor], Waiting]:  # fmt: skip
    """Losses ``[B]``, log-probs ``[N]`` and statistics of a batch, and what waits."""
    values, state, kept = keep_logps(logits, targets, plan, stats)
    with without_autocast(logits.hidden_states.device):
        more = TokenStats(*values) if stats else None
        losses, coefficients = objective(state.logps, chunk, more)
        if plan.sparse:
            dz, active = leave_out(kept.dz, coefficients)
            kept = kept._replace(dz=dz, active=active)
    return [losses, state.logps, *values], Waiting(coefficients, state, kept)


def waiting_gradients(
    logits: Logits, targets: Tensor, waiting: Waiting, plan: HeadPlan,
    wanted: tuple[bool, bool, bool],
) -> Gradients:  # fmt: skip
    """Gradients of hidden states, weight and bias in their dtypes; None where not wanted."""
    coefficients, state, kept = waiting
    hidden, head = logits.hidden_states, logits.head
    if kept.dz.shape[1] < head.width:
        return head_gradients(logits, targets, coefficients, state, plan, wanted, kept=kept)
    with without_autocast(hidden.device):
        columns = FirstColumns(kept, targets, coefficients, head.width, plan.engine)
        # The weight first: its factor is gone before the gradient of the hidden states comes.
        weight, bias = (
            torch.empty_like(t, memory_format=torch.contiguous_format)
            if t is not None and want
            else None
            for t, want in zip((head.weight, head.bias), wanted[1:], strict=True)
        )
        columns.write_head(hidden, weight, bias)
        by_hidden = None
        if wanted[0]:
            made = torch.empty_like if kept.active is None else torch.zeros_like
            by_hidden = made(hidden, memory_format=torch.contiguous_format)
            columns.write_hidden(head.weight, by_hidden)
    return by_hidden, weight, bias
