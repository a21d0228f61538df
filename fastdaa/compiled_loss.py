"""``pair_loss`` as custom operators, for models under ``torch.compile``.

The first operator computes the loss and what its plan keeps for the backward pass, the second one
makes gradients from it, in the dtypes of their tensors. Plans depend on the number of tokens, which
a graph does not know: what is kept has sizes that the graph only learns when it runs. The graph
holds the name of the objective; sizes of sequences are read when it runs (on CUDA one host
synchronisation), so that a batch of other lengths compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.chunks import chunks_of_pairs
from fastdaa.compiled_backward import Saved, pair_loss_gradients, selected_logits
from fastdaa.compiled_logps import HeadSettings, check_compilable
from fastdaa.compiled_operators import (
    by_slopes,
    only_first_differentiable,
    what_waits,
    wide_dtype,
)
from fastdaa.compiled_sizes import HOST_READS, size_from_data
from fastdaa.first_order import first_order
from fastdaa.frozen import logps_and_slopes
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.kept import keep_gradients
from fastdaa.logps import pair_logps, sequence_logps
from fastdaa.losses import Objective
from fastdaa.outputs import (
    STATISTICS,
    BatchTotals,
    PairLossOutput,
    TokenSelection,
    TokenStats,
)
from fastdaa.pair_batch import PairBatch, pair_weights, weighting_of
from fastdaa.plan_call import plan_call
from fastdaa.score import score
from fastdaa.single_pass import run_single_pass
from fastdaa.tiles import Logits, operand_dtype
from fastdaa.validation import check_head_inputs, check_indices
from fastdaa.waiting_rows import WaitingRows


class References(NamedTuple):
    """Tensors of a call that have no gradient; see :func:`fastdaa.pair_loss`."""

    ref_logps: Tensor | None
    ref_token_logps: Tensor | None
    completion_lengths: Tensor | None
    advantages: Tensor | None


def compiled_pair_loss(
    hidden_states: Tensor,
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
    """:func:`fastdaa.pair_loss` on hidden states ``[P, D]`` as one node of a graph.

    Raises:
        ValueError: ``impl="reference"``. What is wrong with tensors is said when the graph runs.
    """
    check_compilable(impl)
    weighted = weighting_of(objective)[1]
    grad = torch.is_grad_enabled()
    tensors = (hidden_states, head.weight, head.bias)
    wanted = [grad and t is not None and t.requires_grad for t in tensors]
    loss, losses, logps, *rest = _pair_loss(
        *tensors, selection.targets, selection.rows, selection.lengths, *references,
        objective.key, None if totals is None else [totals.pairs, totals.chosen_tokens],
        None if totals is None else totals.tokens, *HeadSettings.of(head),
        operand_dtype(hidden_states, head.weight), impl, engine, max_bytes, stats or weighted,
        wanted,
    )  # fmt: skip
    lengths = references.completion_lengths
    policy = pair_logps(
        sequence_logps(logps, selection.lengths), selection.lengths if lengths is None else lengths
    )
    values = TokenStats(*rest[:STATISTICS])
    weights = pair_weights(values.log_sum_sq, logps, selection.lengths) if weighted else None
    # The caller may change log-probs in place, backward reads the others.
    return PairLossOutput(loss, losses, policy, logps.clone(), values if stats else None, weights)


_Outputs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]  # fmt: skip


@torch.library.custom_op("fastdaa::pair_loss", mutates_args=(), tags=HOST_READS)
def _pair_loss(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    positions: Tensor,
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
    shard: list[int] | None,
    group: str | None,
    operand: torch.dtype,
    impl: str,
    engine: str,
    max_bytes: int | None,
    stats: bool,
    wanted: list[bool],
) -> _Outputs:
    """Loss, losses, log-probs, statistics, and :class:`Saved`."""
    head = HeadSettings(softcap, logit_scale, temperature, shard, group).head(weight, bias)
    counts = tuple(lengths.tolist())
    tokens = sum(counts)
    for name, indices in (("rows", positions), ("targets", targets)):
        check_indices(f"selection.{name}", indices, (tokens,))
    check_head_inputs(hidden_states, weight, targets, bias, head.vocab_size, tokens=tokens)
    formula = Objective.by_key(objective)
    plan = plan_call(
        hidden_states, head, wanted=(wanted[0], wanted[1] or wanted[2]), loss_inside=True,
        coupled=formula.coupled, sparse=formula.sparse, tokens=tokens, stats=stats, operand=operand,
        impl=impl, engine=engine, max_bytes=max_bytes, counts=counts,
    )  # fmt: skip
    batch = PairBatch(
        TokenSelection(positions, targets, lengths, counts), formula,
        ref_logps, ref_token_logps, completion_lengths, advantages,
        None if totals is None else BatchTotals(totals[0], totals[1], total_tokens),
        # Elsewhere a call without a compiler leaves the objective to autograd.
        plan.engine if plan.path == "single_pass" else "torch",
    )  # fmt: skip
    logits = selected_logits(hidden_states, head, operand, plan, positions)
    # A call without gradients leaves autograd alone, which inference mode would not let record.
    with _autograd_inside() if any(wanted) else nullcontext():
        results, kept = _evaluate(logits, batch, plan, (wanted[0], wanted[1], wanted[2]), stats)
    saved = Saved.nothing(hidden_states, weight, operand)
    if any(wanted):
        saved = saved._replace(**{name: t for name, t in kept.items() if t is not None})
    return results[0].sum() / batch.totals.pairs, *results, *saved  # type: ignore[return-value]


def _evaluate(
    logits: Logits, batch: PairBatch, plan: HeadPlan, wanted: tuple[bool, bool, bool], stats: bool
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Losses, log-probs and statistics on the path of the plan, and fields of :class:`Saved`."""
    rows, head, targets = logits.hidden_states, logits.head, batch.selection.targets
    saved: dict[str, Tensor | None]
    if plan.kept_whole:
        results, (coefficients, state, kept) = keep_gradients(
            logits, targets, plan, batch.everything, batch.evaluate, stats
        )
        # Whole rows of the buffer: an operator's outputs are best contiguous.
        dz = kept.dz.as_strided((kept.dz.shape[0], kept.dz.stride(0)), (kept.dz.stride(0), 1))
        saved = {
            "coefficients": coefficients,
            "m": state.m,
            "log_s": state.log_s,
            **kept._asdict(),
            "dz": dz,
        }
        return results, saved
    if plan.path == "single_pass":
        chunks = chunks_of_pairs(batch.selection.counts, plan.chunk_tokens)
        results, sums = run_single_pass(
            logits, targets, plan, chunks, batch.evaluate, wanted, stats
        )
        return results, sums.fields()
    if plan.path == "frozen":
        logps, slopes, values = logps_and_slopes(
            rows, head, targets, plan, logits.operand, stats, logits.positions
        )
        saved = {"hidden": slopes.entries, "hidden_scales": slopes.scales}
    else:
        state, more = score(
            rows, head, targets, plan, stats=stats, operand=logits.operand,
            positions=logits.positions,
        )  # fmt: skip
        logps, saved = state.logps, {"m": state.m, "log_s": state.log_s}
        values = list(more) if more else [logps.new_empty(0) for _ in range(STATISTICS)]
    told = TokenStats(*values) if stats else None
    if plan.path == "score":
        return [batch.losses(logps, batch.everything, told), logps, *values], {}
    losses, coefficients = batch.evaluate(logps, batch.everything, told)
    return [losses, logps, *values], saved | {"coefficients": coefficients}


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


def _saves(impl: str, max_bytes: int | None, wanted: list[bool]) -> str:
    """What of :class:`Saved` is kept: ``"nothing"``, ``"slopes"`` of a frozen head, ``"state"`` to
    compute the logits again, or ``"any"``, as the sizes of the batch will have it."""
    waits = what_waits(impl, max_bytes, wanted[0], wanted[1] or wanted[2])
    # A single pass keeps other things.
    may_keep = impl == "single_pass" or (impl == "auto" and waits == "state")
    return "any" if may_keep and any(wanted) else waits


@_pair_loss.register_fake
def _(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, positions: Tensor,
    lengths: Tensor, *rest: Any,
) -> _Outputs:  # fmt: skip
    *_, operand, impl, _, max_bytes, stats, wanted = rest
    tokens, wide = targets.shape[0], wide_dtype(operand)
    shapes: list[Any] = [
        (),
        (lengths.shape[0] // 2,),
        (tokens,),
        *[(tokens if stats else 0,)] * STATISTICS,
    ]
    results = [hidden_states.new_empty(shape, dtype=wide) for shape in shapes]
    saved, saves = Saved.nothing(hidden_states, weight, operand), _saves(impl, max_bytes, wanted)
    if saves == "slopes":
        shape = (tokens, hidden_states.shape[1])
        saved = saved._replace(
            hidden=saved.hidden.new_empty(shape), hidden_scales=results[2].clone()
        )
    if saves in ("slopes", "state"):
        saved = saved._replace(coefficients=results[2].clone())
    if saves == "state":
        saved = saved._replace(m=results[2].clone(), log_s=results[2].clone())
    if saves == "any":
        saved = Saved(*(t.new_empty((size_from_data(), *t.shape[1:])) for t in saved))
        saved = saved._replace(dz=saved.dz.new_empty((saved.dz.shape[0], size_from_data())))
    return *results, *saved  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, weight, bias, targets, positions, *_ = inputs
    *_, impl, _, max_bytes, _, wanted = inputs
    only_first_differentiable(ctx, output)
    ctx.saves, ctx.wanted = _saves(impl, max_bytes, wanted), wanted
    ctx.shape, ctx.dtype, ctx.count = hidden_states.shape, hidden_states.dtype, len(inputs)
    ctx.options = inputs[10], *inputs[13:]
    saved = Saved(*output[3 + STATISTICS :])
    if ctx.saves == "slopes":
        ctx.save_for_backward(saved.hidden, saved.hidden_scales, saved.coefficients, positions)
    else:
        ctx.save_for_backward(hidden_states, weight, bias, targets, positions, output[2], *saved)


@first_order
def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (ctx.count - 3)
    if grad_loss is None:
        return None, None, None, *nothing
    if ctx.saves == "slopes":
        entries, scales, coefficients, positions = ctx.saved_tensors
        by_hidden = by_slopes(WaitingRows(entries, scales), coefficients * grad_loss, ctx.dtype)
        whole = by_hidden.new_zeros(ctx.shape).index_add_(0, positions, by_hidden)
        return whole, None, None, *nothing
    grads = pair_loss_gradients(grad_loss, *ctx.saved_tensors, *ctx.options)
    return *(g if want else None for g, want in zip(grads, ctx.wanted, strict=True)), *nothing


_pair_loss.register_autograd(_backward, setup_context=_setup)
