"""What custom operators share: their contexts, and how gradients pass through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdaa.call_size import packs
from fastdaa.compiled_sizes import size_from_data
from fastdaa.first_order import first_order
from fastdaa.gradient_sums import Gradients
from fastdaa.waiting_rows import WaitingRows


def only_first_differentiable(ctx: Any, output: tuple[Tensor, ...]) -> None:
    """For the backward pass of an operator whose other outputs have no gradient.

    Without it PyTorch makes zeros in their place, as large as what is kept.
    """
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward_by(gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
    """The backward pass of an operator whose first inputs are hidden states, weight and bias.

    ``gradients`` is the operator that makes theirs from the coefficients, what the context has
    saved, its ``options``, and which are wanted. Where what ``waits`` is ``"slopes"`` it has saved
    those of the results alone, the fields of :class:`fastdaa.waiting_rows.WaitingRows`.
    """

    @first_order
    def backward(ctx: Any, coefficients: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (ctx.count - 3)
        if coefficients is None:
            return None, None, None, *nothing
        if ctx.waits == "slopes":
            slopes = WaitingRows(*ctx.saved_tensors)
            return by_slopes(slopes, coefficients, ctx.dtype), None, None, *nothing
        wanted = list(ctx.needs_input_grad[:3])
        grads = gradients(coefficients, *ctx.saved_tensors, *ctx.options, wanted)
        return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *nothing

    return backward


def what_waits(impl: str, max_bytes: int | None, hidden_grad: bool, head_grad: bool) -> str:
    """What a path without the loss keeps for backward: ``"nothing"``, ``"slopes"`` of a frozen
    head, ``"state"`` to compute the logits again, or one of these two, as the plan of the batch
    will have it: ``"any"``."""
    if not (hidden_grad or head_grad):
        return "nothing"
    if head_grad or impl == "recompute":
        return "state"
    return "slopes" if impl == "frozen" or max_bytes is None else "any"


def by_slopes(slopes: WaitingRows, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """``slopes.scaled(coefficients, dtype)`` in a graph, for its compiler."""
    return (slopes.entries * (coefficients * slopes.scales)[:, None]).to(dtype)


def no_slopes(hidden_states: Tensor, operand: torch.dtype) -> WaitingRows:
    """Fields of slopes of hidden states ``[N, D]`` without rows."""
    wide = wide_dtype(operand)
    entries = torch.float16 if packs(hidden_states.dtype) else wide
    columns = hidden_states.shape[1]
    return WaitingRows(
        hidden_states.new_empty((0, columns), dtype=entries), hidden_states.new_empty(0, dtype=wide)
    )


def waiting_fake(
    waits: str, hidden_states: Tensor, operand: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of an operator that wait for backward: ``m``, ``log_s [N]``, and the fields of
    slopes."""
    rows = hidden_states.shape[0]
    state: Any = rows if waits in ("nothing", "state") else 0
    sloping: Any = rows if waits == "slopes" else 0
    if waits == "any":
        state, sloping = size_from_data(), size_from_data()
    entries, scales = no_slopes(hidden_states, operand)
    return (
        scales.new_empty(state), scales.new_empty(state),
        entries.new_empty((sloping, entries.shape[1])), scales.new_empty(sloping),
    )  # fmt: skip


def present(grads: Gradients, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients as outputs of an operator: empty where not wanted."""
    return tuple(hidden_states.new_empty(0) if t is None else t for t in grads)  # type: ignore[return-value]


def present_fake(
    tensors: tuple[Tensor, Tensor, Tensor | None], wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`present` gives for the gradients of ``tensors``, without their values."""
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if want and t is not None
        else None
        for t, want in zip(tensors, wanted, strict=True)
    ]
    return present((grads[0], grads[1], grads[2]), tensors[0])


def wide_dtype(operand: torch.dtype) -> torch.dtype:
    """The dtype of results of products with factors in ``operand``."""
    return torch.float64 if operand == torch.float64 else torch.float32
