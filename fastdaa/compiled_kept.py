"""``head_logps(impl="single_pass")`` as custom operators, for models under ``torch.compile``.

As in :mod:`fastdaa.compiled_logps`; how much is kept for the backward pass depends on the plan, so
the graph learns its size when it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.compiled_logps import HeadSettings
from fastdaa.compiled_operators import (
    backward_by,
    only_first_differentiable,
    present,
    present_fake,
    wide_dtype,
)
from fastdaa.compiled_sizes import size_from_data
from fastdaa.head import LmHead
from fastdaa.kept import Waiting, keep_logps, waiting_gradients
from fastdaa.kept_logps import plan_kept
from fastdaa.kept_products import KeptGradients
from fastdaa.row_passes import RowState
from fastdaa.tiles import Logits, operand_dtype
from fastdaa.validation import check_head_inputs

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def compiled_kept_logps(
    hidden_states: Tensor, head: LmHead, targets: Tensor, *, engine: str, max_bytes: int | None,
    selected: bool,
) -> Tensor:  # fmt: skip
    """:func:`fastdaa.logps.head_logps` with ``impl="single_pass"`` as one node of a graph."""
    grad = torch.is_grad_enabled()
    logps = _kept_logps(
        hidden_states, head.weight, head.bias, targets, *HeadSettings.of(head),
        operand_dtype(hidden_states, head.weight), engine, max_bytes, selected,
        [grad and hidden_states.requires_grad, grad and head.trained],
    )[0]  # fmt: skip
    return logps.clone()  # the caller may change it, backward reads the other


@torch.library.custom_op("fastdaa::kept_logps", mutates_args=())
def _kept_logps(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    shard: list[int] | None,
    group: str | None,
    operand: torch.dtype,
    engine: str,
    max_bytes: int | None,
    selected: bool,
    wanted: list[bool],
) -> _Outputs:
    """Log-probs ``[N]``; ``m`` and ``log_s``, ``[N]`` or empty; kept gradients, their factors and
    the targets' entries ``[N]``."""
    head = HeadSettings(softcap, logit_scale, temperature, shard, group).head(weight, bias)
    check_head_inputs(hidden_states, weight, targets, bias, head.vocab_size)
    plan = plan_kept(
        hidden_states, head, impl="single_pass", engine=engine, max_bytes=max_bytes,
        selected=selected, wanted=(wanted[0], wanted[1]), operand=operand,
    )  # fmt: skip
    assert plan is not None
    logits = Logits(hidden_states, head, operand, plan.engine)
    _, state, (dz, factors, own, _) = keep_logps(logits, targets, plan)
    # Whole rows of the buffer: an operator's outputs are best contiguous.
    dz = dz.as_strided((dz.shape[0], dz.stride(0)), (dz.stride(0), 1))
    return state.logps, state.m, state.log_s, dz, factors, own


@_kept_logps.register_fake
def _(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any):  # type: ignore[no-untyped-def]
    operand, rows = options[5], targets.shape[0]
    logps, factors, own = (
        hidden_states.new_empty(rows, dtype=wide_dtype(operand)) for _ in range(3)
    )
    m, log_s = (logps.new_empty(size_from_data()) for _ in range(2))
    dz = hidden_states.new_empty((rows, size_from_data()), dtype=operand)
    return logps, m, log_s, dz, factors, own


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    only_first_differentiable(ctx, output)
    ctx.options, ctx.count, ctx.waits = inputs[4:], len(inputs), "gradients"
    ctx.save_for_backward(*inputs[:4], *output)


@torch.library.custom_op("fastdaa::kept_logps_gradients", mutates_args=())
def _gradients(
    coefficients: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logps: Tensor,
    m: Tensor,
    log_s: Tensor,
    dz: Tensor,
    factors: Tensor,
    own: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    shard: list[int] | None,
    group: str | None,
    operand: torch.dtype,
    engine: str,
    max_bytes: int | None,
    selected: bool,
    planned: list[bool],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; empty where not wanted. ``planned``: gradients
    that forward saw to be wanted."""
    head = HeadSettings(softcap, logit_scale, temperature, shard, group).head(weight, bias)
    plan = plan_kept(
        hidden_states, head, impl="single_pass", engine=engine, max_bytes=max_bytes,
        selected=selected, wanted=(planned[0], planned[1]), operand=operand,
    )  # fmt: skip
    assert plan is not None
    logits = Logits(hidden_states, head, operand, plan.engine)
    kept = KeptGradients(dz[:, : weight.shape[0]], factors, own)
    waiting = Waiting(coefficients, RowState(m, log_s, logps), kept)
    wants = wanted[0], wanted[1], wanted[2]
    return present(waiting_gradients(logits, targets, waiting, plan, wants), hidden_states)


@_gradients.register_fake
def _(
    coefficients: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return present_fake((hidden_states, weight, bias), rest[-1])


_kept_logps.register_autograd(backward_by(_gradients), setup_context=_setup)
