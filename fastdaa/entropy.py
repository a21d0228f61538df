"""Entropy of the next-token distributions, differentiable: for an entropy bonus, without logits.

With ``H = -sum_v p_v log p_v`` the gradient by the final logits is ``-p_v (log p_v + H)``. It needs
no number of the loss beyond one a token, so the paths are those of log-probs: it is made in forward
where the head is not trained, and from logits computed again where it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdaa.first_order import first_order
from fastdaa.head import LmHead
from fastdaa.plan_call import plan_call
from fastdaa.planner import HeadPlan
from fastdaa.recompute import head_gradients
from fastdaa.row_passes import RowState
from fastdaa.score import score
from fastdaa.tiles import GradientFactor, Logits, blocks, product, without_autocast
from fastdaa.validation import check_choice, check_product, check_vector

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
        RuntimeError: a call inside a graph of ``torch.compile(fullgraph=True)``; without
            ``fullgraph`` the graph breaks here.
        ImportError: ``engine="triton"`` or ``"fused"`` without the package triton.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("token_entropy: expected a call outside torch.compile, got one inside; "
                           "wrap it with torch.compiler.disable")  # fmt: skip
    check_choice("impl", impl, _IMPLS)
    check_product(hidden_states, weight)
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], hidden_states.device)
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    plan = plan_call(
        hidden_states, head, stats=True, entropy=True, impl=impl, engine=engine,
        max_bytes=max_bytes,
    )  # fmt: skip
    if plan.path == "score":
        return _scored(hidden_states, head.detach(), plan)[1]
    return _Entropy.apply(hidden_states, weight, bias, head.detach(), plan)


class _Entropy(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, head, plan)`` to entropies ``[N]``."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, head: LmHead,
        plan: HeadPlan,
    ) -> Tensor:  # fmt: skip
        """The values; for a head that is not trained, also their slopes by the hidden states."""
        ctx.plan, ctx.dtype = plan, hidden_states.dtype
        if plan.path == "frozen":
            values, slopes = _values_and_slopes(hidden_states, head, plan)
            ctx.save_for_backward(slopes)
            return values
        state, values = _scored(hidden_states, head, plan)
        ctx.operand = Logits(hidden_states, head).operand
        ctx.options = replace(head, weight=weight[:0], bias=None)
        ctx.save_for_backward(hidden_states, weight, bias, values, *state)
        return values.clone()  # may be changed in place, as a result of PyTorch's own

    @staticmethod
    @first_order
    def backward(ctx: Any, coefficients: Tensor) -> tuple[Tensor | None, ...]:
        """A row scale where slopes were kept, else the logits once more."""
        if ctx.plan.path == "frozen":
            (slopes,) = ctx.saved_tensors
            # Into the dtype of the result at once: a product of its own would be a second [N, D].
            grad = torch.empty_like(slopes, dtype=ctx.dtype)
            return torch.mul(slopes, coefficients[:, None], out=grad), None, None, None, None
        hidden_states, weight, bias, values, *state = ctx.saved_tensors
        head = replace(ctx.options, weight=weight, bias=bias)
        grads = head_gradients(
            Logits(hidden_states, head, ctx.operand, ctx.plan.engine), _any_targets(hidden_states),
            coefficients, RowState(*state), ctx.plan, ctx.needs_input_grad[:3], entropy=values,
        )  # fmt: skip
        return *grads, None, None


def _any_targets(hidden_states: Tensor) -> Tensor:
    """Statistics of rows come with the log-prob of a token; which one does not matter."""
    return hidden_states.new_zeros(hidden_states.shape[0], dtype=torch.int64)


def _scored(hidden_states: Tensor, head: LmHead, plan: HeadPlan) -> tuple[RowState, Tensor]:
    """Statistics of all rows, and their entropies ``[N]``."""
    state, stats = score(hidden_states, head, _any_targets(hidden_states), plan, stats=True)
    assert stats is not None
    return state, stats.entropy


def _values_and_slopes(
    hidden_states: Tensor, head: LmHead, plan: HeadPlan
) -> tuple[Tensor, Tensor]:
    """Entropies ``[N]`` and their slopes by the hidden states, ``[N, D]``; both wide."""
    logits = Logits(hidden_states, head, engine=plan.engine)
    slopes = hidden_states.new_empty(hidden_states.shape, dtype=logits.wide)
    values = slopes.new_empty(slopes.shape[0])
    ones, targets = torch.ones_like(values), _any_targets(hidden_states)
    with without_autocast(hidden_states.device):
        factor = GradientFactor(logits, ones)
        scaled, weight = factor.scaled(ones), logits.columns(slice(0, head.width))
        for rows in blocks(values.shape[0], plan.block_rows):
            tile = logits.row_tile(logits.rows(rows), weight, slice(0, head.width))
            state, stats = tile.statistics(targets[rows], stats=True, keep=True)
            assert stats is not None
            values[rows] = stats.entropy
            dz = tile.entropy_gradient(state, stats.entropy, scaled[rows])
            slopes[rows] = factor.restore(product(dz.to(logits.operand), weight))
            del tile, dz  # before the next ones are made
    return values, slopes
