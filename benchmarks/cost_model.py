"""FLOP and bytes of a way through the head; :class:`fastdaa.benchmarks.roof.Roof` makes them time.

Derived on ``docs/cost_model.md``. ``U = 2 N V D`` FLOP is one product of the head. Bytes are those
of elementwise passes over tiles of logits and over sums of gradients: what a product reads and
writes itself is part of its measured rate. Nothing overlaps and nothing stays in a cache, so the
model is meant for GPUs; on CPUs tiles are kept in the last-level cache.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastdaa.benchmarks.cases import Case
from fastdaa.planner import plan_head

if TYPE_CHECKING:  # versions that are compared with may have it elsewhere
    from fastdaa.head_plan import HeadPlan

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
_TRL_TOKENS, _TRL_COLUMNS = 4096, 32768


class Cost(NamedTuple):
    """Work of one run."""

    flop: float
    """Of the products."""
    bytes: float
    """Of the passes beside them."""
    dtype: str
    """Of the products."""


def floor(case: Case, products: int) -> Cost:
    """So many products and nothing else."""
    return Cost(products * case.unit, 0.0, case.dtype)


def materialised(case: Case, device: str) -> Cost:
    """Logits in the dtype of the inputs, widened; eager log-softmax, gather, and their backward.

    Bytes a logit: widening reads ``w`` and writes 4; log-softmax reads 8 and writes 4; backward
    fills 4, reads 12 and writes 4, and narrows again. A softcap adds three passes forward (24) and
    four backward (40).
    """
    w = _WIDTH[case.dtype]
    forward = 12 + (0 if w == 4 else 4 + w) + (24 if case.softcap else 0)
    backward = 20 + (0 if w == 4 else 4 + w) + (40 if case.softcap else 0)
    passes = forward + backward * case.wants_grad + forward * _online(case)
    products = 1 + case.wants_grad + case.wants_head_grad + _online(case)
    return Cost(products * case.unit, passes * case.tokens * case.vocab, case.dtype)


def vocabulary_chunks(case: Case, device: str) -> Cost | None:
    """TRL's head on CUDA: tiles of 4096 x 32768 in the dtype of the inputs, one kernel a pass.

    Bytes a logit: forward reads ``w``; backward reads and writes ``w``. The weight's gradient is
    filled (4), read and written (8) once every 4096 tokens, and rounded (4 + w); that of the
    hidden states is read and written (8) for every 32768 columns. None on CPU, where its passes
    are plain PyTorch.
    """
    if device != "cuda":
        return None
    w, n, v, d = _WIDTH[case.dtype], case.tokens, case.vocab, case.hidden
    logit = w + 2 * w * case.wants_grad + w * _online(case)
    total = float(logit * n * v)
    if case.wants_grad:
        total += n * d * (4 + 8 * math.ceil(v / _TRL_COLUMNS) + 4 + w)
    if case.wants_head_grad:
        total += v * d * (4 + 8 * math.ceil(n / _TRL_TOKENS) + 4 + w)
    products = 1 + 2 * case.wants_grad + case.wants_head_grad + _online(case)
    return Cost(products * case.unit, total, case.dtype)


def plan_of(
    case: Case, path: str, device: str, *, impl: str, engine: str = "auto",
    max_bytes: int | None = None,
) -> HeadPlan:  # fmt: skip
    """What fastdaa's planner decides for a case that is to show ``path``, if asked for ``impl``."""
    return plan_head(
        case.vocab, device, hidden_grad=case.wants_grad, head_grad=case.wants_head_grad,
        loss_inside=path == "single_pass", impl=impl, engine=engine, max_bytes=max_bytes,
        tokens=case.tokens, hidden_size=case.hidden,
        operand=getattr(torch, _operand(case, device)), weight_dtype=getattr(torch, case.dtype),
        hidden_dtype=getattr(torch, case.dtype), softcap=case.softcap is not None,
        selected=case.is_loss, gathered=case.is_loss,
    )  # fmt: skip


def _operand(case: Case, device: str) -> str:
    """CPUs have no half-precision product with an fp32 result: operands are widened there."""
    return "float32" if device == "cpu" else case.dtype


def tiled(case: Case, path: str, engine: str, device: str, max_bytes: int | None = None) -> Cost:
    """A path of fastdaa with the tiles that its planner chooses."""
    plan = plan_of(case, path, device, impl=path, engine=engine, max_bytes=max_bytes)
    dtype = _operand(case, device)
    w = _WIDTH[dtype]
    statistics, gradient, recomputed = _logit_passes(engine, w, case.softcap is not None)
    # In bf16 the kernels take statistics and write slopes in one read.
    one_read = engine == "triton" and dtype == "bfloat16"
    logit = {
        "score": statistics,
        "frozen": gradient if one_read else statistics + gradient,
        "single_pass": gradient if one_read and plan.kept_tokens else statistics + gradient,
        "recompute": statistics + recomputed + gradient,
    }[path] + statistics * _online(case)
    again = 1 - plan.kept_columns / case.vocab if plan.keeps_part else 0.0
    again += plan.hidden_rows > 0 and case.wants_head_grad  # both gradients, each on its own
    total = (logit + again * (recomputed + gradient)) * case.tokens * case.vocab
    total += _gradient_sums(case, path, plan, w)
    return Cost((plan.gemms + _online(case)) * case.unit, total, dtype)


def _logit_passes(engine: str, w: int, softcap: bool) -> tuple[int, int, int]:
    """Bytes a logit: statistics, gradient after them, and what a recomputed tile needs besides."""
    if engine == "fused":
        return 0, 0, 0  # statistics come from the product's own accumulator
    if engine == "triton":
        return 4, 4 + w, 0  # statistics leave the logits as they are
    # amax 4; subtract 8; exp 8; sum 4. Times coefficients 8, and the cast for the products.
    statistics, gradient, recomputed = 24, 8 + (0 if w == 4 else 4 + w), 24
    if softcap:
        # Divide, tanh, multiply: 24. The slope: 5 passes of 8, and 12 to multiply by it.
        statistics, gradient, recomputed = statistics + 24, gradient + 52, recomputed + 24
    return statistics, gradient, recomputed


def _gradient_sums(case: Case, path: str, plan: HeadPlan, w: int) -> float:
    """Bytes of the sums of gradients beside their products."""
    if path == "score":
        return 0.0
    n, v, d = case.tokens, case.vocab, case.hidden
    waits = _Waiting(packs=w == 2 and case.dtype == "bfloat16")
    # The hidden states are made one, times coefficients; a half is read beside the targets' rows.
    factor = 2 * w + w * (w == 2) * case.wants_head_grad
    kernels = plan.engine == "triton"  # each of these in one read and one write
    # Normalised, and the targets' rows of the weight are copied and added.
    joined = w if kernels else 8 + 8 + 3 * w
    if path == "frozen":
        beside = 8 if kernels else 0  # read and written; in plain torch by normalising
        return n * d * (beside + joined + waits.kept + waits.read + w)  # and scaled in backward
    # Rows of the weight's gradient: in plain torch parts in order, their sums, and these added.
    sorted_rows = 40.0 + 6 * w
    if kernels:
        sorted_rows = 8.0 + w if path == "single_pass" and not plan.kept_whole else 3.0 * w
    targets = joined + sorted_rows * case.wants_head_grad
    rounded, add = (2.0 if plan.packs_sum else 4.0) + w, 8.0
    apart = targets if w == 2 else 0.0  # recompute's, where a factor would round them
    if plan.kept_whole:
        # A product of the weight's size rounds its results itself. Slices of columns that were not
        # kept add to the gradient of the hidden states.
        slices = math.ceil((v - plan.kept_columns) / plan.tile_columns)
        again = _summed(plan, slices + 1) + apart if slices else 0.0
        # The weight's are filled with zeros, and read by the product that adds to them.
        begun = 2.0 * w * plan.kept_columns * d * (w == 2) * case.wants_head_grad
        return n * d * (rounded + factor + targets + again) + begun
    if path == "recompute":
        parts = math.ceil(n / plan.tile_rows)
        slices = math.ceil(v / (plan.hidden_columns or plan.tile_columns))
        # The product of a slice and all tokens rounds its results itself.
        weight = add * (parts - 1) + (4.0 + w) * (w != 4) if parts > 1 else 0.0
        hidden = _summed(plan, slices) + rounded * (w != 4) + apart
        return n * d * hidden + v * d * weight * case.wants_head_grad
    # Rows are filled with zeros, in case that some are left out, and written; where gradients are
    # kept, times their coefficients. In the end they get the loss's own gradient. The weight's
    # first product writes a sum, the others read and write it.
    parts = math.ceil(n / plan.chunk_tokens)
    hidden = waits.read + waits.kept + (add + factor + targets) * (plan.kept_tokens > 0)
    hidden += waits.read + w
    weight = add * (parts - 1) + waits.kept + waits.read + w
    return n * d * hidden + v * d * weight * case.wants_head_grad


class _Waiting:
    """Bytes an entry of a gradient that waits for backward: in fp16 where it is returned in bf16,
    else wide."""

    def __init__(self, packs: bool):
        self.kept = 4.0 + 4 + 2 if packs else 0.0  # its row's largest entry, then itself
        self.read = 2.0 if packs else 4.0


def _summed(plan: HeadPlan, slices: int) -> float:
    """Bytes an entry of a sum that so many slices of the vocabulary write or add to; in the memory
    of what is returned it is wide for one slice at a time."""
    if plan.packs_sum:
        return 10.0 * slices + (6.0 + 8) * (slices - 1)
    return 8.0 * (slices - 1)


def _online(case: Case) -> int:
    return int(case.is_loss and case.reference == "online")
