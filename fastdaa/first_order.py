"""Backward passes that are not differentiable themselves, and say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(backward: Backward) -> Backward:
    """Decorate the ``backward`` of an autograd function whose gradients are constants.

    With ``create_graph=True`` what it returns raises when differentiated. PyTorch's
    ``once_differentiable`` does so only if the incoming gradient requires a gradient, which that
    of a plain sum does not: a gradient penalty would silently count as 0.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            made = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return made
        return tuple(t if t is None else _Constant.apply(t.detach().requires_grad_()) for t in made)

    return wrapped


class _Constant(torch.autograd.Function):
    """The identity, whose derivative nobody may ask for."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(
            "expected first derivatives alone, got a derivative of a gradient (create_graph=True); "
            "impl='reference' of token_logps has second ones"
        )
