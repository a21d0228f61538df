"""3U for any loss: gradients of all logits are kept until the backward pass brings the loss's.

The other way to 3U, :mod:`fastdaa.single_pass`, wants the loss inside the call and serves batches
of any length. This one leaves the loss to its caller, who may write any expression of the token
log-probs in plain PyTorch, and wants memory for one gradient tile of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.first_order import first_order
from fastdaa.head import LmHead
from fastdaa.kept import Unscaled, kept_gradients
from fastdaa.plan_call import plan_call
from fastdaa.planner import HeadPlan
from fastdaa.score import join
from fastdaa.target_rows import TargetRows
from fastdaa.tiles import Logits, without_autocast


class KeptLogps(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, targets, head, plan, stats)`` to log-probs ``[N]``.

    Beside them, without gradient, the three token statistics (empty unless ``stats``).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        head: LmHead, plan: HeadPlan, stats: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Statistics, and ``d logp / d logits`` of every token, ``[N, V]`` as a factor."""
        logits = Logits(hidden_states, head, engine=plan.engine)
        with without_autocast(hidden_states.device):
            kept = Unscaled(logits, targets, plan, targets.shape[0], stats)
            logps = kept.make(slice(0, targets.shape[0]))
        saved = (targets, kept.dz, kept.factors, kept.own)
        ctx.save_for_backward(hidden_states, weight, bias, *saved)
        ctx.sparse = plan.sparse
        values = join(kept.values, 3, logps.new_empty(0))
        ctx.mark_non_differentiable(*values)
        return logps, *values

    @staticmethod
    @first_order
    def backward(ctx: Any, coefficients: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Both products; what was saved stays as it is, so that backward can run again."""
        hidden, weight, bias, targets, dz, factors, own = ctx.saved_tensors
        active = None
        if ctx.sparse:
            active = coefficients.nonzero()[:, 0]
            # A copy of the rows, which has to be less than half of their products to be worth it.
            if 2 * active.shape[0] < coefficients.shape[0]:
                dz = dz[active]
            else:
                active = None
        with without_autocast(hidden.device):
            rows = TargetRows(targets, coefficients * factors, coefficients * own)
            wanted = ctx.needs_input_grad[:3]
            grads = kept_gradients(dz, rows, active, hidden, weight, bias, wanted)
        return *grads, None, None, None, None


def plan_kept(
    hidden_states: Tensor, head: LmHead, *, stats: bool = False, impl: str = "auto",
    engine: str = "auto", max_bytes: int | None = None, sparse: bool = False,
    selected: bool = False,
) -> HeadPlan | None:  # fmt: skip
    """The plan that keeps the gradients of all logits; None where there is none to be had.

    It needs a head that is trained and whole (no slice of the vocabulary), factors other than fp16
    (which would round too much) and memory: for bf16 factors what :func:`fastdaa.pair_loss` keeps
    of a whole batch, for wider ones a chunk of its single pass.

    Raises:
        ValueError: there is none, and ``impl`` asks for it.
    """
    plan = plan_call(
        hidden_states, head, loss_inside=True, stats=stats, impl=impl, engine=engine,
        max_bytes=max_bytes, sparse=sparse, selected=selected,
    )  # fmt: skip
    tokens, operand = hidden_states.shape[0], Logits(hidden_states, head).operand
    fits = plan.kept_whole or (not plan.kept_tokens and tokens <= plan.tile_rows)
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
