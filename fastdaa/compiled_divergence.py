"""``token_divergence`` as custom operators, for models under ``torch.compile``.

As in :mod:`fastdaa.compiled_logps`, both heads are inside one node of the graph, with the code that
runs without a compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.compiled_operators import (
    backward_by,
    no_slopes,
    only_first_differentiable,
    present,
    present_fake,
    waiting_fake,
    what_waits,
    wide_dtype,
)
from fastdaa.divergence_tiles import (
    check_pair,
    divergence_gradients,
    divergences,
    fused_divergences,
    plan_divergence,
)
from fastdaa.head import LmHead
from fastdaa.tiles import Logits, operand_dtype


def compiled_token_divergence(
    hidden_states: Tensor,
    head: LmHead,
    ref_hidden_states: Tensor,
    ref_head: LmHead,
    *,
    kind: str,
    engine: str,
    max_bytes: int | None,
) -> Tensor:
    """:func:`fastdaa.token_divergence` as one node of a graph.

    Raises:
        ValueError: a head with a slice of the vocabulary. What is wrong with tensors is said when
            the graph runs.
    """
    grad = torch.is_grad_enabled()
    if head.shard is not None or ref_head.shard is not None:
        raise ValueError("head, ref_head: expected the whole vocabulary, got a slice of it")
    return _divergence(
        hidden_states, head.weight, head.bias,
        ref_hidden_states.detach(), ref_head.weight.detach(),
        None if ref_head.bias is None else ref_head.bias.detach(),
        head.softcap, head.logit_scale, head.temperature,
        ref_head.softcap, ref_head.logit_scale, ref_head.temperature,
        operand_dtype(hidden_states, head.weight),
        operand_dtype(ref_hidden_states, ref_head.weight), kind, engine, max_bytes,
        grad and hidden_states.requires_grad, grad and head.trained,
    )[0]  # fmt: skip


@torch.library.custom_op("fastdaa::token_divergence", mutates_args=())
def _divergence(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden_states: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ref_softcap: float | None,
    ref_logit_scale: float,
    ref_temperature: float,
    operand: torch.dtype,
    ref_operand: torch.dtype,
    kind: str,
    engine: str,
    max_bytes: int | None,
    hidden_grad: bool,
    head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences ``[N]``, and the fields of their slopes ``[N, D]`` where the head is not
    trained."""
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    ref_head = LmHead(ref_weight, ref_bias, ref_softcap, ref_logit_scale, ref_temperature)
    check_pair(hidden_states, head, ref_hidden_states, ref_head)
    plan = plan_divergence(
        hidden_states, head, hidden_grad=hidden_grad, head_grad=head_grad, engine=engine,
        max_bytes=max_bytes,
    )  # fmt: skip
    if plan.engine == "fused":
        values = fused_divergences(hidden_states, head, ref_hidden_states, ref_head, kind, plan)
        return values, *no_slopes(hidden_states, operand)
    policy, ref = (
        Logits(hidden_states, head, operand), Logits(ref_hidden_states, ref_head, ref_operand),
    )  # fmt: skip
    values, slopes = divergences(policy, ref, kind, plan)
    return values, *(slopes or no_slopes(hidden_states, operand))


def _waits(hidden_grad: bool, head_grad: bool) -> str:
    return what_waits("auto", None, hidden_grad, head_grad)


@_divergence.register_fake
def _(hidden_states: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, operand, _, _, _, _, hidden_grad, head_grad = rest
    values = hidden_states.new_empty(hidden_states.shape[0], dtype=wide_dtype(operand))
    *_, entries, scales = waiting_fake(_waits(hidden_grad, head_grad), hidden_states, operand)
    return values, entries, scales


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    only_first_differentiable(ctx, output)
    ctx.waits, ctx.dtype, ctx.options = _waits(*inputs[-2:]), inputs[0].dtype, inputs[6:-2]
    ctx.count = len(inputs)
    ctx.save_for_backward(*(output[1:] if ctx.waits == "slopes" else inputs[:6]))


@torch.library.custom_op("fastdaa::token_divergence_gradients", mutates_args=())
def _gradients(
    coefficients: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden_states: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ref_softcap: float | None,
    ref_logit_scale: float,
    ref_temperature: float,
    operand: torch.dtype,
    ref_operand: torch.dtype,
    kind: str,
    engine: str,
    max_bytes: int | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the policy's hidden states, weight and bias; empty where not wanted."""
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    ref_head = LmHead(ref_weight, ref_bias, ref_softcap, ref_logit_scale, ref_temperature)
    plan = plan_divergence(
        hidden_states, head, hidden_grad=wanted[0], head_grad=wanted[1] or wanted[2],
        engine=engine, max_bytes=max_bytes,
    )  # fmt: skip
    grads = divergence_gradients(
        Logits(hidden_states, head, operand), Logits(ref_hidden_states, ref_head, ref_operand),
        coefficients, kind, plan, (wanted[0], wanted[1], wanted[2]),
    )  # fmt: skip
    return present(grads, hidden_states)


@_gradients.register_fake
def _(
    coefficients: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return present_fake((hidden_states, weight, bias), rest[-1])


_divergence.register_autograd(backward_by(_gradients), setup_context=_setup)
