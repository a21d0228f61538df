"""What has no derivative, and says so: backward passes, and kernels in forward mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(backward: Backward) -> Backward:
    """Decorate the ``backward`` of an autograd function whose gradients are constants.

    With ``create_graph=True`` what it returns raises when differentiated, by whatever the result
    depends on: the gradients that came in, and all leaves of the graph. PyTorch's
    ``once_differentiable`` knows of the former alone, which for a plain sum have no gradient: a
    gradient penalty would silently count as 0.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if any(_is_batched(grad) for grad in grads if grad is not None):
            raise RuntimeError(
                "expected one gradient at a time, got a batch of them (is_grads_batched, "
                "vectorize=True): loop over them; impl='reference' of token_logps takes batches"
            )
        with torch.no_grad():
            made = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return made
        # Autograd runs a node only on the way to a tensor that it is asked for.
        behind = [t for t in (*grads, *_leaves(ctx)) if t is not None and t.requires_grad]
        return tuple(t if t is None else _Constant.apply(t.detach(), *behind) for t in made)

    return wrapped


def check_no_tangents(engine: str, *tensors: Tensor | None) -> None:
    """Raise ``RuntimeError`` for a tensor with a derivative of forward mode, which kernels would
    silently lose: their results would be constants."""
    if any(t is not None and unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"engine={engine!r}: expected tensors without tangents, got one of "
            "torch.autograd.forward_ad; engine='torch' has derivatives in forward mode where none "
            "are wanted in backward"
        )


def _is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for several, as in a call with ``is_grads_batched``: PyTorch has no
    other name for what it maps backward passes with."""
    return "Batched" in str(torch._C._dispatch_keys(tensor))


def _leaves(node: Any) -> Iterator[Tensor]:
    """The leaf tensors that a node of a graph depends on."""
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        following = {further for further, _ in node.next_functions if further is not None} - seen
        seen |= following
        pending += following


class _Constant(torch.autograd.Function):
    """``apply(gradient, *behind)``: the gradient, whose derivative nobody may ask for."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *behind: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(
            "expected first derivatives alone, got a derivative of a gradient (create_graph=True); "
            "impl='reference' of token_logps has second ones"
        )
