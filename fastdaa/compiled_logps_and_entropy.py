"""``token_logps_and_entropy`` as custom operators, for models under ``torch.compile``.

As in :mod:`fastdaa.compiled_logps`, the head is inside one node of the graph, with the code that
runs without a compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.compiled_operators import present, present_fake, wide_dtype
from fastdaa.first_order import first_order
from fastdaa.head import LmHead
from fastdaa.plan_call import plan_call
from fastdaa.recompute import head_gradients
from fastdaa.row_passes import EntropyTerm, RowState
from fastdaa.score import score
from fastdaa.tiles import Logits, operand_dtype
from fastdaa.validation import check_head_inputs


def compiled_logps_and_entropy(
    hidden_states: Tensor, head: LmHead, targets: Tensor, *, impl: str, engine: str,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`fastdaa.token_logps_and_entropy` as one node of a graph."""
    grad = torch.is_grad_enabled()
    logps, entropies, *_ = _both(
        hidden_states, head.weight, head.bias, targets, head.softcap, head.logit_scale,
        head.temperature, operand_dtype(hidden_states, head.weight), impl, engine, max_bytes,
        grad and hidden_states.requires_grad, grad and head.trained,
    )  # fmt: skip
    return logps.clone(), entropies.clone()  # the caller may change them, backward reads the others


@torch.library.custom_op("fastdaa::token_logps_and_entropy", mutates_args=())
def _both(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    operand: torch.dtype,
    impl: str,
    engine: str,
    max_bytes: int | None,
    hidden_grad: bool,
    head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropies, ``m`` and ``log_s``, all ``[N]``."""
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    check_head_inputs(hidden_states, weight, targets, bias)
    plan = plan_call(
        hidden_states, head, wanted=(hidden_grad, head_grad), stats=True, bonus=True,
        operand=operand, impl=impl, engine=engine, max_bytes=max_bytes,
    )  # fmt: skip
    state, stats = score(hidden_states, head, targets, plan, stats=True, operand=operand)
    assert stats is not None
    return state.logps, stats.entropy, state.m, state.log_s


@_both.register_fake
def _(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(options[3])
    return tuple(hidden_states.new_empty(targets.shape[0], dtype=wide) for _ in range(4))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.options, ctx.count = inputs[4:-2], len(inputs)
    ctx.save_for_backward(*inputs[:4], *output)


@torch.library.custom_op("fastdaa::token_logps_and_entropy_gradients", mutates_args=())
def _gradients(
    by_logps: Tensor | None,
    by_entropies: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logps: Tensor,
    entropies: Tensor,
    m: Tensor,
    log_s: Tensor,
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
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    plan = plan_call(
        hidden_states, head, wanted=(wanted[0], wanted[1] or wanted[2]), stats=True, bonus=True,
        operand=operand, impl=impl, engine=engine, max_bytes=max_bytes,
    )  # fmt: skip
    grads = head_gradients(
        Logits(hidden_states, head, operand, plan.engine), targets,
        torch.zeros_like(logps) if by_logps is None else by_logps, RowState(m, log_s, logps), plan,
        (wanted[0], wanted[1], wanted[2]),
        None if by_entropies is None else EntropyTerm(entropies, by_entropies),
    )  # fmt: skip
    return present(grads, hidden_states)


@_gradients.register_fake
def _(
    by_logps: Tensor | None, by_entropies: Tensor | None, hidden_states: Tensor, weight: Tensor,
    bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return present_fake((hidden_states, weight, bias), rest[-1])


@first_order
def _backward(
    ctx: Any, by_logps: Tensor | None, by_entropies: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (ctx.count - 3)
    if by_logps is None and by_entropies is None:
        return None, None, None, *nothing
    wanted = list(ctx.needs_input_grad[:3])
    grads = _gradients(by_logps, by_entropies, *ctx.saved_tensors, *ctx.options, wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *nothing


_both.register_autograd(_backward, setup_context=_setup)
