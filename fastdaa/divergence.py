"""Exact divergences between two heads' next-token distributions, token by token.

Sampled log-ratios (k1) estimate the same quantities with far more variance; here every position
contributes its expectation over the whole vocabulary, without an ``[N, V]`` tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdaa.compiled_divergence import compiled_token_divergence
from fastdaa.divergence_tiles import (
    check_pair,
    divergence_gradients,
    divergences,
    fused_divergences,
    plan_divergence,
)
from fastdaa.first_order import first_order
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.tiles import Logits
from fastdaa.validation import check_choice, check_kind
from fastdaa.waiting_rows import WaitingRows

KINDS = ("kl", "reverse_kl", "js")


def token_divergence(
    hidden_states: Tensor,
    head: LmHead,
    ref_hidden_states: Tensor,
    ref_head: LmHead,
    *,
    kind: str = "kl",
    engine: str = "auto",
    max_bytes: int | None = None,
) -> Tensor:
    """Divergence of the policy's next-token distribution from the reference's at every position.

    Differentiable towards the policy's hidden states, weight and bias; the reference is a constant.
    Costs 2U without gradient, 3U where the head is not trained (the gradient of the hidden states
    is made in the forward pass), else 6U.

    Args:
        hidden_states: ``[N, D]`` of the policy.
        head: head of the policy.
        ref_hidden_states: ``[N, D']`` of the reference at the same positions.
        ref_head: head of the reference, over the same vocabulary.
        kind: ``"kl"`` for ``KL(policy || ref)``, ``"reverse_kl"`` for ``KL(ref || policy)``,
            ``"js"`` for the Jensen-Shannon divergence (at most ln 2).
        engine: ``"torch"``, ``"fused"`` (values only, no logits in memory; contiguous inputs of
            one dtype up to fp32), or ``"auto"``, for now torch.
        max_bytes: memory beyond inputs and returned gradients; None for the default of the device.

    Returns:
        ``[N]`` in nats, fp32 (fp64 for an fp64 policy). ``"kl"`` is infinite where the reference
        excludes a token that the policy does not, ``"reverse_kl"`` in the opposite case.

    Raises:
        TypeError, ValueError: an unknown ``kind``, inputs of a wrong dtype or shape, another number
            of positions or another vocabulary, or an engine that cannot serve the call.
        ImportError: ``engine="fused"`` without the package triton.
        RuntimeError: ``engine="fused"`` gives other results than plain torch on this GPU.
    """
    check_choice("kind", kind, KINDS)
    check_choice("engine", engine, ("auto", "torch", "fused"))
    for name, value in (("head", head), ("ref_head", ref_head)):
        check_kind(name, value, LmHead, "LmHead(weight)")
    if torch.compiler.is_compiling():
        return compiled_token_divergence(
            hidden_states, head, ref_hidden_states, ref_head,
            kind=kind, engine=engine, max_bytes=max_bytes,
        )  # fmt: skip
    check_pair(hidden_states, head, ref_hidden_states, ref_head)
    grad = torch.is_grad_enabled()
    plan = plan_divergence(
        hidden_states, head, hidden_grad=grad and hidden_states.requires_grad,
        head_grad=grad and head.trained, engine=engine, max_bytes=max_bytes,
    )  # fmt: skip
    ref_hidden_states, ref_head = ref_hidden_states.detach(), ref_head.detach()
    if plan.engine == "fused":
        return fused_divergences(hidden_states, head, ref_hidden_states, ref_head, kind, plan)
    return _Divergence.apply(
        hidden_states, head.weight, head.bias, ref_hidden_states, ref_head.weight, ref_head.bias,
        head.detach(), ref_head, kind, plan,
    )  # fmt: skip


def token_kl(
    hidden_states: Tensor,
    head: LmHead,
    ref_hidden_states: Tensor,
    ref_head: LmHead,
    *,
    engine: str = "auto",
    max_bytes: int | None = None,
) -> Tensor:
    """:func:`token_divergence` with ``kind="kl"``: ``KL(policy || ref)``, ``[N]`` in nats."""
    return token_divergence(
        hidden_states, head, ref_hidden_states, ref_head, engine=engine, max_bytes=max_bytes
    )


class _Divergence(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, ref_hidden_states, ref_weight, ref_bias, head, ref_head,
    kind, plan)`` to divergences ``[N]``.

    The heads carry the options; their tensors are replaced by those before them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None,
        ref_hidden_states: Tensor, ref_weight: Tensor, ref_bias: Tensor | None, head: LmHead,
        ref_head: LmHead, kind: str, plan: HeadPlan,
    ) -> Tensor:  # fmt: skip
        """The values; for a head that is not trained, also their slopes by the hidden states."""
        policy, ref = Logits(hidden_states, head), Logits(ref_hidden_states, ref_head)
        values, slopes = divergences(policy, ref, kind, plan)
        ctx.kind, ctx.plan, ctx.dtype = kind, plan, hidden_states.dtype
        ctx.operands = (policy.operand, ref.operand)
        ctx.options = (head.settings(), ref_head.settings())
        ctx.frozen = slopes is not None
        if slopes is not None:
            ctx.save_for_backward(*slopes)
            return values
        # A change in place before the backward pass raises, of the reference's tensors, too, but of
        # those made in inference mode, which autograd does not save.
        reference = (ref_hidden_states, ref_weight, ref_bias)
        ctx.unsaved = [t if t is not None and t.is_inference() else None for t in reference]
        saved = [
            t if unsaved is None else None
            for t, unsaved in zip(reference, ctx.unsaved, strict=True)
        ]
        ctx.save_for_backward(hidden_states, weight, bias, *saved)
        return values

    @staticmethod
    @first_order
    def backward(ctx: Any, coefficients: Tensor) -> tuple[Tensor | None, ...]:
        """A row scale where slopes were kept, else both heads' logits once more."""
        nothing = (None,) * 7
        if ctx.frozen:
            slopes = WaitingRows(*ctx.saved_tensors)
            return slopes.scaled(coefficients, ctx.dtype), None, None, *nothing
        saved = ctx.saved_tensors
        reference = [
            t if unsaved is None else unsaved
            for t, unsaved in zip(saved[3:], ctx.unsaved, strict=True)
        ]
        policy, ref = (
            Logits(hidden, replace(options, weight=weight, bias=bias), operand)
            for (hidden, weight, bias), options, operand in zip(
                (saved[:3], reference), ctx.options, ctx.operands, strict=True
            )
        )
        grads = divergence_gradients(
            policy, ref, coefficients, ctx.kind, ctx.plan, ctx.needs_input_grad[:3]
        )
        return *grads, *nothing
