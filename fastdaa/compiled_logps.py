"""``head_logps`` as custom operators, for models under ``torch.compile``.

Under a compiler the head is one opaque node of the graph, with the same code inside that runs
without one: no graph break, the same bits. Choices that depend on values are made inside, when the
graph runs; what gradients are wanted is known when it is traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.engines import RowState
from fastdaa.frozen import logps_and_slopes
from fastdaa.head import LmHead
from fastdaa.planner import HeadPlan, plan_head
from fastdaa.recompute import head_gradients
from fastdaa.score import score
from fastdaa.tiles import Logits, operand_dtype

# Marks an output that this call does not have: an operator's outputs are all tensors.
_ABSENT = 0


def compiled_head_logps(
    hidden_states: Tensor,
    head: LmHead,
    targets: Tensor,
    *,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
) -> Tensor:
    """:func:`fastdaa.logps.head_logps` as one node of a graph.

    Raises:
        ValueError: a head with a slice of the vocabulary, or ``impl="reference"``.
    """
    check_compilable(head, impl)
    grad = torch.is_grad_enabled()
    return _logps(
        hidden_states, head.weight, head.bias, targets,
        head.softcap, head.logit_scale, head.temperature,
        operand_dtype(hidden_states, head.weight), impl, engine, max_bytes,
        grad and hidden_states.requires_grad, grad and head.trained,
    )[0]  # fmt: skip


def check_compilable(head: LmHead, impl: str) -> None:
    """Raise ``ValueError`` for what is no single node of a graph."""
    if head.shard is not None:
        raise ValueError("expected a head with the whole vocabulary under torch.compile, got a "
                         "slice of it")  # fmt: skip
    if impl == "reference":
        raise ValueError("impl: expected another path than 'reference' under torch.compile")


@torch.library.custom_op("fastdaa::head_logps", mutates_args=())
def _logps(
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
    """Log-probs ``[N]``, and for the backward pass ``m`` and ``log_s [N]`` or slopes ``[N, D]``."""
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    plan = _plan(head, hidden_states, hidden_grad, head_grad, impl, engine, max_bytes)
    wide = wide_dtype(operand)
    absent = hidden_states.new_empty(_ABSENT, dtype=wide)
    if plan.path == "frozen":
        logps, slopes, _ = logps_and_slopes(hidden_states, head, targets, plan, operand)
        return logps, absent, absent.clone(), slopes
    state, _ = score(hidden_states, head, targets, plan, operand=operand)
    return state.logps, state.m, state.log_s, absent


@_logps.register_fake
def _(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    softcap: float | None, logit_scale: float, temperature: float, operand: torch.dtype,
    impl: str, engine: str, max_bytes: int | None, hidden_grad: bool, head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, wide = targets.shape[0], wide_dtype(operand)
    frozen = hidden_grad and not head_grad and impl != "recompute"
    vector = 0 if frozen else rows
    slopes = tuple(hidden_states.shape) if frozen else (_ABSENT,)
    shapes: list[Any] = [(rows,), (vector,), (vector,), slopes]
    return tuple(hidden_states.new_empty(shape, dtype=wide) for shape in shapes)  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, weight, bias, targets, *options = inputs
    logps, m, log_s, slopes = output
    hidden_grad, head_grad = options[-2:]
    ctx.options, ctx.dtype = options[:-2], hidden_states.dtype
    ctx.frozen = hidden_grad and not head_grad and options[4] != "recompute"
    if ctx.frozen:
        ctx.save_for_backward(slopes)
    else:
        ctx.save_for_backward(hidden_states, weight, bias, targets, logps, m, log_s)


def _backward(ctx: Any, coefficients: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 10
    if ctx.frozen:
        (slopes,) = ctx.saved_tensors
        return (slopes * coefficients[:, None]).to(ctx.dtype), None, None, *nothing
    wanted = list(ctx.needs_input_grad[:3])
    grads = _gradients(coefficients, *ctx.saved_tensors, *ctx.options, wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *nothing


_logps.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("fastdaa::head_gradients", mutates_args=())
def _gradients(
    coefficients: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logps: Tensor,
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
    plan = _plan(head, hidden_states, wanted[0], wanted[1] or wanted[2], impl, engine, max_bytes)
    grads = head_gradients(
        Logits(hidden_states, head, operand, plan.engine), targets, coefficients,
        RowState(m, log_s, logps), plan, (wanted[0], wanted[1], wanted[2]),
    )  # fmt: skip
    absent = hidden_states.new_empty(_ABSENT, dtype=wide_dtype(operand))
    return tuple(absent.clone() if t is None else t for t in grads)  # type: ignore[return-value]


@_gradients.register_fake
def _(
    coefficients: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None,
    targets: Tensor, logps: Tensor, m: Tensor, log_s: Tensor, softcap: float | None,
    logit_scale: float, temperature: float, operand: torch.dtype, impl: str, engine: str,
    max_bytes: int | None, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    absent = hidden_states.new_empty(_ABSENT, dtype=wide_dtype(operand))
    return tuple(  # type: ignore[return-value]
        torch.empty_like(t) if want and t is not None else absent.clone()
        for t, want in zip((hidden_states, weight, bias), wanted, strict=True)
    )


def wide_dtype(operand: torch.dtype) -> torch.dtype:
    """The dtype of results of products with factors in ``operand``."""
    return torch.float64 if operand == torch.float64 else torch.float32


def _plan(
    head: LmHead, hidden_states: Tensor, hidden_grad: bool, head_grad: bool, impl: str,
    engine: str, max_bytes: int | None,
) -> HeadPlan:  # fmt: skip
    return plan_head(
        head.vocab_size, hidden_states.device, hidden_grad=hidden_grad, head_grad=head_grad,
        impl=impl, engine=engine, max_bytes=max_bytes,
    )  # fmt: skip
