"""``pair_loss`` as a custom operator, for models under ``torch.compile``.

The operator computes the loss and its gradients at once, on every path: a loss is a scalar, so the
backward pass is a scale. The graph holds the name of the objective; sizes of sequences are read
when it runs (on CUDA one host synchronisation), so that a batch of other lengths compiles nothing
anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.compiled_logps import check_compilable, wide_dtype
from fastdaa.frozen import logps_and_slopes
from fastdaa.head import LmHead
from fastdaa.logps import pair_logps, sequence_logps
from fastdaa.losses import Objective
from fastdaa.outputs import BatchTotals, PairLossOutput, TokenSelection, TokenStats
from fastdaa.pair_batch import PairBatch
from fastdaa.planner import HeadPlan, plan_head
from fastdaa.recompute import Gradients, head_gradients
from fastdaa.score import score
from fastdaa.single_pass import (
    chunks_of_pairs,
    run_single_pass,
    single_pass_plan,
)
from fastdaa.tiles import Logits, operand_dtype


class References(NamedTuple):
    """Tensors of a call that have no gradient; see :func:`fastdaa.pair_loss`."""

    ref_logps: Tensor | None
    ref_token_logps: Tensor | None
    completion_lengths: Tensor | None
    advantages: Tensor | None


def compiled_pair_loss(
    rows: Tensor,
    head: LmHead,
    selection: TokenSelection,
    objective: Objective,
    references: References,
    totals: BatchTotals | None,
    *,
    stats: bool,
    impl: str,
    engine: str,
    max_bytes: int | None,
) -> PairLossOutput:
    """:func:`fastdaa.pair_loss` on selected rows ``[N, D]`` as one node of a graph.

    Raises:
        ValueError: a head with a slice of the vocabulary, or ``impl="reference"``. What is wrong
            with tensors is said when the graph runs.
    """
    check_compilable(head, impl)
    grad = torch.is_grad_enabled()
    wanted = [grad and t is not None and t.requires_grad for t in (rows, head.weight, head.bias)]
    loss, losses, logps, *rest = _pair_loss(
        rows, head.weight, head.bias, selection.targets, selection.lengths, *references,
        objective.key, None if totals is None else list(totals[:2]),
        None if totals is None else totals.tokens,
        head.softcap, head.logit_scale, head.temperature, operand_dtype(rows, head.weight),
        impl, engine, max_bytes, stats, wanted,
    )  # fmt: skip
    lengths = references.completion_lengths
    policy = pair_logps(
        sequence_logps(logps, selection.lengths), selection.lengths if lengths is None else lengths
    )
    return PairLossOutput(loss, losses, policy, logps, TokenStats(*rest[:3]) if stats else None)


@torch.library.custom_op("fastdaa::pair_loss", mutates_args=())
def _pair_loss(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lengths: Tensor,
    ref_logps: Tensor | None,
    ref_token_logps: Tensor | None,
    completion_lengths: Tensor | None,
    advantages: Tensor | None,
    objective: str,
    totals: list[int] | None,
    total_tokens: int | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    operand: torch.dtype,
    impl: str,
    engine: str,
    max_bytes: int | None,
    stats: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, losses, log-probs, three statistics, three wide gradients (empty where not wanted)."""
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    formula = Objective.by_key(objective)
    plan = plan_head(
        head.vocab_size, rows.device, hidden_grad=wanted[0], head_grad=wanted[1] or wanted[2],
        loss_inside=True, coupled=formula.coupled, impl=impl, engine=engine, max_bytes=max_bytes,
    )  # fmt: skip
    batch = PairBatch(
        TokenSelection(rows, targets, lengths, tuple(lengths.tolist())), formula,
        ref_logps, ref_token_logps, completion_lengths, advantages,
        None if totals is None else BatchTotals(totals[0], totals[1], total_tokens), plan.engine,
    )  # fmt: skip
    logits = Logits(rows, head, operand, plan.engine)
    with _autograd_inside():
        results, grads = _evaluate(logits, batch, plan, (wanted[0], wanted[1], wanted[2]), stats)
    loss = results[0].sum() / batch.totals.pairs
    absent = loss.new_empty(0)
    sums = [absent.clone() if t is None else t for t in grads]
    return loss, *results, *sums  # type: ignore[return-value]


def _evaluate(
    logits: Logits, batch: PairBatch, plan: HeadPlan, wanted: tuple[bool, bool, bool], stats: bool
) -> tuple[list[Tensor], Gradients]:
    """Losses, log-probs, statistics and wide gradients on the path of the plan."""
    rows, head, targets = logits.hidden_states, logits.head, batch.selection.targets
    if plan.path == "single_pass":
        plan = single_pass_plan(plan, head)
        chunks = chunks_of_pairs(batch.selection.counts, plan.tile_rows)
        return run_single_pass(logits, targets, plan, chunks, batch.evaluate, wanted, stats)
    grads: Gradients = (None, None, None)
    if plan.path == "frozen":
        logps, slopes, values = logps_and_slopes(rows, head, targets, plan, logits.operand, stats)
        losses, coefficients = batch.evaluate(logps, batch.everything)
        grads = (slopes * coefficients[:, None], None, None)
    else:
        state, more = score(rows, head, targets, plan, stats=stats, operand=logits.operand)
        logps = state.logps
        values = list(more) if more else [logps.new_empty(0) for _ in range(3)]
        losses, coefficients = batch.evaluate(logps, batch.everything)
        if plan.path == "recompute":
            grads = head_gradients(logits, targets, coefficients, state, plan, wanted, wide=True)
    return [losses, logps, *values], grads


@contextmanager
def _autograd_inside() -> Iterator[None]:
    """Lets autograd record inside an operator where a grad mode asks for it, as objectives do for
    their derivatives.

    PyTorch runs operators below autograd: nothing would be recorded, and the gradient would be 0.
    """
    key = torch._C.DispatchKey
    with torch.no_grad(), torch._C._PreserveDispatchKeyGuard():
        for excluded in (key.AutogradFunctionality, key.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(excluded, False)
        with torch.enable_grad():
            recorded = (torch.ones(1, requires_grad=True) * 1.0).requires_grad
        if not recorded:
            raise RuntimeError("expected autograd to record inside a custom operator; this version "
                               f"of PyTorch ({torch.__version__}) does not let it")  # fmt: skip
        yield


@_pair_loss.register_fake
def _(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lengths: Tensor,
    ref_logps: Tensor | None, ref_token_logps: Tensor | None, completion_lengths: Tensor | None,
    advantages: Tensor | None, objective: str, totals: list[int] | None,
    total_tokens: int | None, softcap: float | None, logit_scale: float, temperature: float,
    operand: torch.dtype, impl: str, engine: str, max_bytes: int | None, stats: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens = targets.shape[0]
    per_token = tokens if stats else 0
    shapes: list[Any] = [(), (lengths.shape[0] // 2,), (tokens,), *(((per_token,),) * 3)]
    shapes += [
        t.shape if want and t is not None else (0,)
        for t, want in zip((rows, weight, bias), wanted, strict=True)
    ]
    return tuple(rows.new_empty(shape, dtype=wide_dtype(operand)) for shape in shapes)  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted, ctx.count = inputs[-1], len(inputs)
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.save_for_backward(*output[-3:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = [
        (total * grad_loss).to(dtype) if want else None
        for total, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return *grads, *([None] * (ctx.count - 3))


_pair_loss.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("fastdaa::select_pairs", mutates_args=())
def _select(labels: Tensor, order: str, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[N]``, targets ``[N]`` and lengths ``[2B]`` of :func:`fastdaa.select_pairs`."""
    from fastdaa.selection import select_pairs

    return select_pairs(labels, order=order, ignore_index=ignore_index)[:3]


@_select.register_fake
def _(labels: Tensor, order: str, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.library.get_ctx().new_dynamic_size()
    return (
        labels.new_empty(tokens), labels.new_empty(tokens), labels.new_empty(labels.shape[0]),
    )  # fmt: skip


def compiled_select_pairs(labels: Tensor, order: str, ignore_index: int) -> TokenSelection:
    """:func:`fastdaa.select_pairs` as one node of a graph; its counts are not known to the host."""
    rows, targets, lengths = _select(labels, order, ignore_index)
    return TokenSelection(rows, targets, lengths, ())
