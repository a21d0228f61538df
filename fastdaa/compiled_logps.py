"""``head_logps`` and ``token_stats`` as custom operators, for models under ``torch.compile``.

Under a compiler the head is one opaque node of the graph, with the same code inside that runs
without one: no graph break, the same bits. Choices that depend on values are made inside, when the
graph runs; what gradients are wanted is known when it is traced.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
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
from fastdaa.frozen import logps_and_slopes
from fastdaa.head import LmHead
from fastdaa.outputs import STATISTICS, TokenStats
from fastdaa.plan_call import plan_call
from fastdaa.recompute import head_gradients
from fastdaa.row_passes import RowState
from fastdaa.score import score
from fastdaa.tiles import Logits, operand_dtype
from fastdaa.validation import check_head_inputs
from fastdaa.vocab_shard import VocabShard
from fastdaa.waiting_rows import WaitingRows


class HeadSettings(NamedTuple):
    """A head beside its tensors, in what an operator can take."""

    softcap: float | None
    logit_scale: float
    temperature: float
    shard: list[int] | None
    """First token, size of the vocabulary, and of the widest slice if it was given; None for a
    whole head."""
    group: str | None
    """Name of the processes' group, or None for all of them."""

    @classmethod
    def of(cls, head: LmHead) -> HeadSettings:
        """Those of a head."""
        shard, group = head.shard, None
        if shard is not None and shard.group is not None:
            group = shard.group.group_name
        place = None
        if shard is not None:
            widest = [] if shard.widest is None else [shard.widest]
            place = [shard.start, shard.vocab_size, *widest]
        return cls(head.softcap, head.logit_scale, head.temperature, place, group)

    def head(self, weight: Tensor, bias: Tensor | None) -> LmHead:
        """The head with these tensors."""
        shard = None
        if self.shard is not None:
            resolve: Any = dist.distributed_c10d._resolve_process_group
            start, vocab_size, *widest = self.shard
            group = None if self.group is None else resolve(self.group)
            shard = VocabShard(start, vocab_size, group, *widest)
        return LmHead(weight, bias, *self[:3], shard)


def compiled_head_logps(
    hidden_states: Tensor,
    head: LmHead,
    targets: Tensor,
    *,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
    selected: bool = False,
) -> Tensor:
    """:func:`fastdaa.logps.head_logps` as one node of a graph.

    Raises:
        ValueError: ``impl="reference"``.
    """
    check_compilable(impl)
    grad = torch.is_grad_enabled()
    logps = _logps(
        hidden_states, head.weight, head.bias, targets, *HeadSettings.of(head),
        operand_dtype(hidden_states, head.weight), impl, engine, max_bytes, selected,
        grad and hidden_states.requires_grad, grad and head.trained,
    )[0]  # fmt: skip
    return logps.clone()  # the caller may change it, backward reads the other


def compiled_token_stats(
    hidden_states: Tensor, head: LmHead, targets: Tensor, *, engine: str, max_bytes: int | None
) -> tuple[Tensor, TokenStats]:
    """:func:`fastdaa.token_stats` as one node of a graph."""
    with torch.no_grad():
        logps, *values = _stats(
            hidden_states, head.weight, head.bias, targets, *HeadSettings.of(head),
            operand_dtype(hidden_states, head.weight), engine, max_bytes,
        )  # fmt: skip
    return logps, TokenStats(*values)


def check_compilable(impl: str) -> None:
    """Raise ``ValueError`` for what is no single node of a graph."""
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
    shard: list[int] | None,
    group: str | None,
    operand: torch.dtype,
    impl: str,
    engine: str,
    max_bytes: int | None,
    selected: bool,
    hidden_grad: bool,
    head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs ``[N]``, and for the backward pass ``m`` and ``log_s [N]`` or the fields of slopes
    ``[N, D]``."""
    head = HeadSettings(softcap, logit_scale, temperature, shard, group).head(weight, bias)
    check_head_inputs(hidden_states, weight, targets, bias, head.vocab_size)
    plan = plan_call(
        hidden_states, head, wanted=(hidden_grad, head_grad), operand=operand, impl=impl,
        engine=engine, max_bytes=max_bytes, selected=selected,
    )  # fmt: skip
    # An operator's outputs are all tensors, those that this call does not have empty ones.
    absent = no_slopes(hidden_states, operand)
    if plan.path == "frozen":
        logps, slopes, _ = logps_and_slopes(hidden_states, head, targets, plan, operand)
        return logps, absent.scales, absent.scales.clone(), *slopes
    state, _ = score(hidden_states, head, targets, plan, operand=operand)
    return state.logps, state.m, state.log_s, *absent


@_logps.register_fake
def _(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, operand, impl, _, max_bytes, _, hidden_grad, head_grad = options
    waits = what_waits(impl, max_bytes, hidden_grad, head_grad)
    logps = hidden_states.new_empty(targets.shape[0], dtype=wide_dtype(operand))
    return logps, *waiting_fake(waits, hidden_states, operand)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, weight, bias, targets, *options, hidden_grad, head_grad = inputs
    logps, *waiting = output
    only_first_differentiable(ctx, output)
    ctx.options, ctx.dtype, ctx.count = options, hidden_states.dtype, len(inputs)
    impl, _, max_bytes, _ = options[-4:]
    ctx.waits = what_waits(impl, max_bytes, hidden_grad, head_grad)
    if ctx.waits == "slopes":
        ctx.save_for_backward(*waiting[2:])
    else:
        ctx.save_for_backward(hidden_states, weight, bias, targets, logps, *waiting)


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
    slopes: Tensor,
    scales: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    shard: list[int] | None,
    group: str | None,
    operand: torch.dtype,
    impl: str,
    engine: str,
    max_bytes: int | None,
    selected: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; empty where not wanted."""
    if slopes.shape[0]:
        by_hidden = WaitingRows(slopes, scales).scaled(coefficients, hidden_states.dtype)
        return present((by_hidden, None, None), hidden_states)
    head = HeadSettings(softcap, logit_scale, temperature, shard, group).head(weight, bias)
    plan = plan_call(
        hidden_states, head, wanted=(wanted[0], wanted[1] or wanted[2]), operand=operand, impl=impl,
        engine=engine, max_bytes=max_bytes, selected=selected,
    )  # fmt: skip
    grads = head_gradients(
        Logits(hidden_states, head, operand, plan.engine), targets, coefficients,
        RowState(m, log_s, logps), plan, (wanted[0], wanted[1], wanted[2]),
    )  # fmt: skip
    return present(grads, hidden_states)


@_gradients.register_fake
def _(
    coefficients: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return present_fake((hidden_states, weight, bias), rest[-1])


_logps.register_autograd(backward_by(_gradients), setup_context=_setup)


@torch.library.custom_op("fastdaa::token_stats", mutates_args=())
def _stats(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs and statistics, all ``[N]``."""
    head = HeadSettings(softcap, logit_scale, temperature, shard, group).head(weight, bias)
    check_head_inputs(hidden_states, weight, targets, bias, head.vocab_size)
    plan = plan_call(
        hidden_states, head, wanted=(False, False), stats=True, operand=operand, engine=engine,
        max_bytes=max_bytes,
    )  # fmt: skip
    state, values = score(hidden_states, head, targets, plan, stats=True, operand=operand)
    assert values is not None
    return state.logps, *values


@_stats.register_fake
def _(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, operand, _, _ = options
    logps = hidden_states.new_empty(targets.shape[0], dtype=wide_dtype(operand))
    return logps, *(torch.empty_like(logps) for _ in range(STATISTICS))  # type: ignore[return-value]
