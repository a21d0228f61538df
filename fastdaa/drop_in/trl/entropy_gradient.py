"""A gradient for entropies that came with log-probs: made if a loss asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.entropy import token_entropy
from fastdaa.first_order import first_order
from fastdaa.head import LmHead


def with_gradient(
    entropy: Tensor, hidden_states: Tensor, head: LmHead, max_bytes: int | None
) -> Tensor:
    """``entropy [N]`` as a differentiable function of hidden states and head.

    It costs nothing unless backward comes by: then :func:`fastdaa.token_entropy` is computed and
    differentiated (2U for a head that is not trained, else 4U).

    Args:
        entropy: ``[N]`` of the head's predictions, in nats, without gradient.
        hidden_states: ``[N, D]``.
        head: weight, bias and options.
        max_bytes: as in :func:`fastdaa.token_entropy`.
    """
    return _MadeLater.apply(
        hidden_states, head.weight, head.bias, entropy, head.detach(), max_bytes
    )


class _MadeLater(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, entropy, head, max_bytes)`` to ``entropy``."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, entropy: Tensor,
        head: LmHead, max_bytes: int | None,
    ) -> Tensor:  # fmt: skip
        """The values as they are."""
        ctx.save_for_backward(hidden_states, weight, bias)
        ctx.options = head.settings()
        ctx.max_bytes = max_bytes
        device = hidden_states.device.type
        ctx.autocast = (
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )  # fmt: skip
        return entropy.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, coefficients: Tensor) -> tuple[Tensor | None, ...]:
        """The entropies once more, under the autocast of forward, and their gradient."""
        hidden_states, weight, bias = inputs = [
            None if t is None else t.detach().requires_grad_(wanted)
            for t, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        ]
        assert hidden_states is not None and weight is not None
        options = ctx.options
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            again = token_entropy(
                hidden_states, weight, bias=bias, softcap=options.softcap,
                logit_scale=options.logit_scale, temperature=options.temperature,
                max_bytes=ctx.max_bytes,
            )  # fmt: skip
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        made = iter(torch.autograd.grad(again, wanted, coefficients))
        grads = [next(made) if t is not None and t.requires_grad else None for t in inputs]
        return *grads, None, None, None
