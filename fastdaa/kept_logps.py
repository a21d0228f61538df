"""3U for any loss: gradients of the logits are kept until the backward pass brings the loss's.

The other way to 3U, :mod:`fastdaa.single_pass`, wants the loss inside the call. This one leaves it
to its caller, who may write any expression of the token log-probs in plain PyTorch. What memory
does not hold is computed again, up to 4U.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdaa.first_order import first_order
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.kept import Waiting, keep_logps, waiting_gradients
from fastdaa.kept_products import KeptGradients
from fastdaa.plan_call import plan_call
from fastdaa.row_passes import RowState
from fastdaa.tiles import Logits


class KeptLogps(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, targets, head, plan, stats)`` to log-probs ``[N]``.

    Beside them, without gradient, the token statistics (empty unless ``stats``).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        head: LmHead, plan: HeadPlan, stats: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Statistics, and ``d logp / d logits`` of every token, ``[N, V]`` as a factor."""
        logits = Logits(hidden_states, head, engine=plan.engine)
        values, state, kept = keep_logps(logits, targets, plan, stats)
        ctx.save_for_backward(hidden_states, weight, bias, targets, *state, *kept)
        ctx.plan, ctx.operand = plan, logits.operand
        ctx.options = head.settings()
        ctx.mark_non_differentiable(*values)
        return state.logps.clone(), *values  # the caller may change it, backward reads the other

    @staticmethod
    @first_order
    def backward(ctx: Any, coefficients: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Both products; what was saved stays as it is, so that backward can run again."""
        hidden, weight, bias, targets, *saved = ctx.saved_tensors
        state, kept, plan = RowState(*saved[:3]), KeptGradients(*saved[3:]), ctx.plan
        if plan.sparse and not plan.keeps_part:
            active = coefficients.nonzero()[:, 0]
            # A copy of the rows, which has to be less than half of their products to be worth it.
            if 2 * active.shape[0] < coefficients.shape[0]:
                kept = kept._replace(dz=kept.dz[active], active=active)
        head = replace(ctx.options, weight=weight, bias=bias)
        logits = Logits(hidden, head, ctx.operand, plan.engine)
        waiting = Waiting(coefficients, state, kept)
        grads = waiting_gradients(logits, targets, waiting, plan, ctx.needs_input_grad[:3])
        return *grads, None, None, None, None


def plan_kept(
    hidden_states: Tensor, head: LmHead, *, stats: bool = False, impl: str = "auto",
    engine: str = "auto", max_bytes: int | None = None, sparse: bool = False,
    selected: bool = False, wanted: tuple[bool, bool] | None = None,
    operand: torch.dtype | None = None,
) -> HeadPlan | None:  # fmt: skip
    """The plan that keeps gradients of logits; None where there is none worth taking.

    It needs a head that is trained and whole (no slice of the vocabulary), factors other than fp16
    (which would round too much) and memory: bf16 factors for a part of the gradients at least, see
    :mod:`fastdaa.single_pass_memory`, wider ones for a chunk of :func:`fastdaa.pair_loss`.

    Args:
        wanted, operand: as in :func:`fastdaa.plan_call.plan_call`.

    Raises:
        ValueError: there is none, and ``impl`` asks for it.
    """
    tokens, operand = hidden_states.shape[0], Logits(hidden_states, head, operand).operand
    # As for a loss that couples all tokens: none is known before backward.
    narrow = operand == torch.bfloat16 and tokens > 0 and head.shard is None
    plan = plan_call(
        hidden_states, head, loss_inside=True, coupled=narrow, stats=stats, impl=impl,
        engine=engine, max_bytes=max_bytes, sparse=sparse, selected=selected, wanted=wanted,
        operand=operand,
    )  # fmt: skip
    in_a_chunk = not plan.kept_tokens and tokens <= plan.tile_rows
    fits = plan.kept_whole or in_a_chunk or tokens == 0
    if plan.path == "single_pass" and fits and head.shard is None and operand != torch.float16:
        return plan
    if impl == "single_pass":
        raise ValueError(
            "impl='single_pass' with the loss outside the call: expected a whole vocabulary, "
            f"factors other than fp16 and at most {plan.chunk_tokens} tokens, whose gradients of "
            f"logits fit in memory, got {tokens} tokens, {operand} and "
            f"{'a slice' if head.shard else 'the whole'} of it; fastdaa.pair_loss takes any number"
        )
    return None
