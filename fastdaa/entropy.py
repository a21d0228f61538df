"""Entropy of the next-token distributions, differentiable: for an entropy bonus, without logits.

The gradient needs no number of the loss beyond one a token, so the paths are those of log-probs: it
is made in forward where the head is not trained, and from logits computed again where it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdaa.compiled_entropy import compiled_token_entropy
from fastdaa.entropy_tiles import entropies, entropies_and_slopes, entropy_gradients, plan_entropy
from fastdaa.first_order import first_order
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.tiles import Logits, operand_dtype
from fastdaa.validation import check_choice, check_product, check_vector
from fastdaa.waiting_rows import WaitingRows

_IMPLS = ("auto", "score", "frozen", "recompute")


def token_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
) -> Tensor:
    """Entropy of the next-token distribution at every position, without the logits.

    Differentiable towards ``hidden_states``, ``weight`` and ``bias``. Costs 1U without gradient, 2U
    where the head is not trained (the gradient is made in the forward pass), else 4U.

    Args:
        hidden_states: ``[N, D]`` fp16, bf16, fp32 or fp64.
        weight: ``[V, D]`` of the head, the whole vocabulary.
        bias, softcap, logit_scale, temperature: as in :func:`fastdaa.token_logps`.
        impl: ``"auto"``, ``"score"`` (no gradient), ``"frozen"`` (head not trained) or
            ``"recompute"``.
        engine, max_bytes: as in :func:`fastdaa.token_logps`.

    Returns:
        ``[N]`` in nats, from 0 to ``log(V)``; fp32 (fp64 if an input is fp64).

    Raises:
        TypeError, ValueError: inputs of a wrong dtype, shape or device, or an ``impl`` or
            ``engine`` that cannot serve this call.
        ImportError: ``engine="triton"`` or ``"fused"`` without the package triton.
    """
    check_choice("impl", impl, _IMPLS)
    check_product(hidden_states, weight)
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], hidden_states.device)
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    if torch.compiler.is_compiling():
        return compiled_token_entropy(
            hidden_states, head, impl=impl, engine=engine, max_bytes=max_bytes
        )
    plan = plan_entropy(hidden_states, head, impl=impl, engine=engine, max_bytes=max_bytes)
    operand = operand_dtype(hidden_states, weight)
    if plan.path == "score":
        return entropies(hidden_states, head.detach(), plan, operand)[1]
    return _Entropy.apply(hidden_states, weight, bias, head.detach(), plan, operand)


class _Entropy(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, head, plan, operand)`` to entropies ``[N]``."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, head: LmHead,
        plan: HeadPlan, operand: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """The values; for a head that is not trained, also their slopes by the hidden states."""
        ctx.plan, ctx.dtype, ctx.operand = plan, hidden_states.dtype, operand
        if plan.path == "frozen":
            values, slopes = entropies_and_slopes(hidden_states, head, plan, operand)
            ctx.save_for_backward(*slopes)
            return values
        state, values = entropies(hidden_states, head, plan, operand)
        ctx.options = head.settings()
        ctx.save_for_backward(hidden_states, weight, bias, values, state.m, state.log_s)
        return values.clone()  # may be changed in place, as a result of PyTorch's own

    @staticmethod
    @first_order
    def backward(ctx: Any, coefficients: Tensor) -> tuple[Tensor | None, ...]:
        """A row scale where slopes were kept, else the logits once more."""
        nothing = (None, None, None)
        if ctx.plan.path == "frozen":
            slopes = WaitingRows(*ctx.saved_tensors)
            return slopes.scaled(coefficients, ctx.dtype), None, None, *nothing
        hidden_states, weight, bias, values, m, log_s = ctx.saved_tensors
        head = replace(ctx.options, weight=weight, bias=bias)
        logits = Logits(hidden_states, head, ctx.operand, ctx.plan.engine)
        grads = entropy_gradients(
            logits, coefficients, values, m, log_s, ctx.plan, ctx.needs_input_grad[:3]
        )
        return *grads, *nothing
