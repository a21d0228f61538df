"""``token_entropy`` as custom operators, for models under ``torch.compile``.

As in :mod:`fastdaa.compiled_logps`, the head is inside one node of the graph, with the code that
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
from fastdaa.entropy_tiles import entropies, entropies_and_slopes, entropy_gradients, plan_entropy
from fastdaa.head import LmHead
from fastdaa.tiles import Logits, operand_dtype
from fastdaa.waiting_rows import WaitingRows


def compiled_token_entropy(
    hidden_states: Tensor, head: LmHead, *, impl: str, engine: str, max_bytes: int | None
) -> Tensor:
    """:func:`fastdaa.token_entropy` as one node of a graph."""
    grad = torch.is_grad_enabled()
    values = _entropy(
        hidden_states, head.weight, head.bias, head.softcap, head.logit_scale, head.temperature,
        operand_dtype(hidden_states, head.weight), impl, engine, max_bytes,
        grad and hidden_states.requires_grad, grad and head.trained,
    )[0]  # fmt: skip
    return values.clone()  # the caller may change it, backward reads the other


@torch.library.custom_op("fastdaa::token_entropy", mutates_args=())
def _entropy(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    operand: torch.dtype,
    impl: str,
    engine: str,
    max_bytes: int | None,
    hidden_grad: bool,
    head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Entropies ``[N]``, and for the backward pass ``m`` and ``log_s [N]`` or the fields of slopes
    ``[N, D]``."""
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    plan = plan_entropy(
        hidden_states, head, impl=impl, engine=engine, max_bytes=max_bytes,
        wanted=(hidden_grad, head_grad), operand=operand,
    )  # fmt: skip
    absent = no_slopes(hidden_states, operand)
    if plan.path == "frozen":
        values, slopes = entropies_and_slopes(hidden_states, head, plan, operand)
        return values, absent.scales, absent.scales.clone(), *slopes
    state, values = entropies(hidden_states, head, plan, operand)
    return values, state.m, state.log_s, *absent


@_entropy.register_fake
def _(hidden_states: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, operand, impl, _, max_bytes, hidden_grad, head_grad = rest
    waits = what_waits(impl, max_bytes, hidden_grad, head_grad)
    values = hidden_states.new_empty(hidden_states.shape[0], dtype=wide_dtype(operand))
    return values, *waiting_fake(waits, hidden_states, operand)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, weight, bias, *options, hidden_grad, head_grad = inputs
    values, *waiting = output
    only_first_differentiable(ctx, output)
    ctx.options, ctx.dtype, ctx.count = options, hidden_states.dtype, len(inputs)
    impl, _, max_bytes = options[-3:]
    ctx.waits = what_waits(impl, max_bytes, hidden_grad, head_grad)
    if ctx.waits == "slopes":
        ctx.save_for_backward(*waiting[2:])
    else:
        ctx.save_for_backward(hidden_states, weight, bias, values, *waiting)


@torch.library.custom_op("fastdaa::token_entropy_gradients", mutates_args=())
def _gradients(
    coefficients: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    m: Tensor,
    log_s: Tensor,
    slopes: Tensor,
    scales: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    operand: torch.dtype,
    impl: str,
    engine: str,
    max_bytes: int | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; empty where not wanted."""
    if slopes.shape[0]:
        by_hidden = WaitingRows(slopes, scales).scaled(coefficients, hidden_states.dtype)
        return present((by_hidden, None, None), hidden_states)
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    plan = plan_entropy(
        hidden_states, head, impl=impl, engine=engine, max_bytes=max_bytes,
        wanted=(wanted[0], wanted[1] or wanted[2]), operand=operand,
    )  # fmt: skip
    grads = entropy_gradients(
        Logits(hidden_states, head, operand, plan.engine), coefficients, values, m, log_s, plan,
        (wanted[0], wanted[1], wanted[2]),
    )  # fmt: skip
    return present(grads, hidden_states)


@_gradients.register_fake
def _(
    coefficients: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return present_fake((hidden_states, weight, bias), rest[-1])


_entropy.register_autograd(backward_by(_gradients), setup_context=_setup)
