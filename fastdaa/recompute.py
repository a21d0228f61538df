"""4U: any loss on a trained head. Backward computes the logits again, vocabulary-major.

Every slice of the weight's gradient is summed over all tokens at once and written once. The
gradient of the hidden states, which every slice adds to, is an ``[N, D]`` sum, wide or
(:mod:`fastdaa.waiting_rows`) in the memory of what is returned. Where memory holds neither, or no
slice is wanted, it is made a block of rows at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdaa.call_size import takes_targets_apart
from fastdaa.engines import RowTile, own_slope
from fastdaa.first_order import first_order
from fastdaa.gradient_sums import Gradients
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.kept_products import FirstColumns, KeptGradients
from fastdaa.outputs import STATISTICS
from fastdaa.row_passes import EntropyTerm, RowState, in_tile
from fastdaa.score import score
from fastdaa.target_rows import TargetRows, add_target_rows, finish_hidden
from fastdaa.tiles import (
    GradientFactor,
    Logits,
    blocks,
    operand_dtype,
    sum_over_shards,
    without_autocast,
)
from fastdaa.waiting_rows import WaitingRows


class Recompute(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, targets, head, plan, stats, positions, bonus)`` to
    log-probs ``[N]``.

    Beside them the token statistics (empty unless ``stats``), without gradient, but for the first,
    the entropy, with a ``bonus``. ``head`` carries the options; its tensors are replaced by
    ``weight`` and ``bias``. Hidden states are ``[N, D]``, or ``[P, D]`` with ``positions [N]``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: LmHead,
        plan: HeadPlan,
        stats: bool,
        positions: Tensor | None = None,
        bonus: bool = False,
    ) -> tuple[Tensor, ...]:
        """Statistics only; the inputs and three or four numbers a token are kept."""
        state, values = score(hidden_states, head, targets, plan, stats=stats, positions=positions)
        ctx.plan = plan
        ctx.options = head.settings()
        ctx.operand = operand_dtype(hidden_states, weight)
        absent = state.m.new_empty(0)
        more = list(values) if values is not None else [absent.clone() for _ in range(STATISTICS)]
        # The caller may change what is returned, backward reads what is saved.
        kept = more[0].clone() if bonus else None
        ctx.save_for_backward(hidden_states, weight, bias, targets, positions, kept, *state)
        ctx.mark_non_differentiable(*more[1:] if bonus else more)
        ctx.set_materialize_grads(False)
        return state.logps.clone(), *more

    @staticmethod
    @first_order
    def backward(
        ctx: Any, coefficients: Tensor | None, by_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states, the weight and the bias, those that are wanted."""
        hidden_states, weight, bias, targets, positions, values, *rows = ctx.saved_tensors
        nothing = (None,) * 6
        if coefficients is None and by_entropy is None:
            return None, None, None, *nothing
        entropy = None if by_entropy is None else EntropyTerm(values, by_entropy)
        if coefficients is None:
            coefficients = torch.zeros_like(rows[0])
        head = replace(ctx.options, weight=weight, bias=bias)
        by_hidden, *others = head_gradients(
            Logits(hidden_states, head, ctx.operand, ctx.plan.engine, positions),
            targets,
            coefficients,
            RowState(*rows),
            ctx.plan,
            ctx.needs_input_grad[:3],
            entropy,
        )
        if by_hidden is not None and positions is not None:
            whole = hidden_states.new_zeros(hidden_states.shape)
            by_hidden = whole.index_add_(0, positions, by_hidden)
        return by_hidden, *others, *nothing


def head_gradients(
    logits: Logits,
    targets: Tensor,
    coefficients: Tensor | None,
    rows: RowState,
    plan: HeadPlan,
    wanted: tuple[bool, bool, bool],
    entropy: EntropyTerm | None = None,
    kept: KeptGradients | None = None,
) -> Gradients:
    """Gradients of ``sum(coefficients * logps)``, of the sum of entropies with coefficients, or of
    both, by rows ``[N, D]`` of hidden states, weight and bias.

    A slice of the weight's gradient is one product over all tokens, or a wide sum of several, and
    rounded and written once: no wide ``[V, D]`` exists.

    Args:
        kept: gradients of the logits of the first columns, which are not computed again.
    """
    head, hidden_states = logits.head, logits.hidden_states
    active = None
    if kept is not None:
        active = kept.active
    elif plan.sparse:
        active = _active(coefficients, entropy)
    if active is not None:
        by_hidden, weight, bias = head_gradients(
            logits.pick(active), targets[active],
            None if coefficients is None else coefficients[active], rows.pick(active),
            replace(plan, sparse=False), wanted, None if entropy is None else entropy.pick(active),
            None if kept is None else kept.of_active(),
        )  # fmt: skip
        return _among(logits, active, by_hidden), weight, bias
    made = torch.empty_like if targets.shape[0] else torch.zeros_like  # without products
    weight, bias = (
        made(t, memory_format=torch.contiguous_format) if t is not None and want else None
        for t, want in zip((head.weight, head.bias), wanted[1:], strict=True)
    )
    with without_autocast(hidden_states.device):
        first = None
        if kept is not None and coefficients is not None:
            first = FirstColumns(kept, targets, coefficients, head.width, plan.engine)
        if first is not None:
            first.write_head(hidden_states, weight, bias, logits.positions)
        start = 0 if first is None else first.width
        call = _Backward(logits, targets, coefficients, rows, plan, entropy, start)
        total, by_hidden = None, None
        if wanted[0] and not plan.hidden_rows:
            total = WaitingRows.empty(
                hidden_states, logits.wide, packed=plan.packs_sum, rows=logits.tokens
            )
        if first is not None and total is not None:
            first.put_hidden(head.weight, total)
        if total is not None or weight is not None or bias is not None:
            for part in blocks(head.width - start, plan.tile_columns):
                columns = slice(start + part.start, start + part.stop)
                call.add_slice(columns, total, weight, bias)
        if total is not None:
            by_hidden = call.finished(total)
            del total  # before targets' rows come
        elif wanted[0]:
            by_hidden = call.hidden_by_rows(plan.hidden_rows, plan.hidden_columns)
        if weight is not None:
            call.add_targets(weight)
    return by_hidden, weight, bias


class _Backward:
    """A backward pass, a slice of the vocabulary at a time."""

    def __init__(
        self, logits: Logits, targets: Tensor, coefficients: Tensor | None, rows: RowState,
        plan: HeadPlan, entropy: EntropyTerm | None, start: int,
    ):  # fmt: skip
        self.logits, self.targets, self.rows = logits, targets, rows
        self.apart = coefficients is not None and _takes_targets_apart(logits)
        if coefficients is not None and self.apart:
            own = own_slope(logits.head, rows, coefficients, entropy)
            self.own = torch.where(targets >= start, own, 0.0)  # others are where start came from
            self.rest = torch.zeros_like(self.own)
            """What rounding the targets' entries to factors has taken from them."""
        of_entropy = None if entropy is None else entropy.coefficients
        given = [c for c in (coefficients, of_entropy) if c is not None]
        self.factor = GradientFactor(logits, torch.cat(given))
        scaled = self.factor.scaled
        self.scaled = None if coefficients is None else scaled(coefficients)
        self.entropy = None
        if entropy is not None:
            self.entropy = entropy._replace(coefficients=scaled(entropy.coefficients))
        self.parts = list(blocks(targets.shape[0], plan.tile_rows))

    def add_slice(
        self, columns: slice, by_hidden: WaitingRows | None, weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:  # fmt: skip
        """Adds to the gradient of the hidden states; writes a slice of the others."""
        operand, wide = self.logits.columns(columns), self.logits.wide
        by_weight = None if weight is None else weight[columns]
        by_bias = None if bias is None else torch.zeros_like(bias[columns], dtype=wide)
        total = by_weight
        if by_weight is not None and by_weight.dtype != wide and len(self.parts) > 1:
            total = torch.empty_like(by_weight, dtype=wide)  # one product rounds its own results
        for r in self.parts:
            hidden = self.logits.rows(r)
            tile = self.logits.tile_again(hidden, operand, columns)
            dz = self._gradient(tile, r)
            if by_bias is not None:
                by_bias += self.factor.restore(tile.column_sums(dz))
            dz = self._as_factor(dz, r, columns)
            if by_hidden is not None:
                self._add_hidden(by_hidden, r, dz, operand, first=columns.start == 0)
            if total is not None:
                self._put(total, dz.T, hidden, first=r.start == 0)
            del tile, dz, hidden  # before the next ones are made
        if by_weight is not None and total is not None and total is not by_weight:
            by_weight.copy_(total)
        if bias is not None and by_bias is not None:
            bias[columns] = by_bias

    def hidden_by_rows(self, block_rows: int, width: int) -> Tensor:
        """The gradient of the hidden states: the wide sum of a block of rows at a time, each
        rounded once."""
        hidden = self.logits.hidden_states
        grad = hidden.new_empty((self.logits.tokens, hidden.shape[1]))
        for rows in blocks(grad.shape[0], block_rows):
            hidden = self.logits.rows(rows)
            total = torch.empty_like(grad[rows], dtype=self.logits.wide)
            for columns in blocks(self.logits.head.width, width):
                operand = self.logits.columns(columns)
                dz = self._gradient(self.logits.tile_again(hidden, operand, columns), rows)
                dz = self._as_factor(dz, rows, columns)
                self._put(total, dz, operand, first=columns.start == 0)
                del dz, operand  # before the next ones are made
            sum_over_shards(total, self.logits.head)
            if self.apart:
                ones = torch.ones_like(self.rest[rows])
                self._finish(total, ones, rows, grad[rows])
            else:
                grad[rows] = total
            del hidden, total
        return grad

    def finished(self, sums: WaitingRows) -> Tensor:
        """The gradient of the hidden states in their dtype; the sums are given up."""
        entries, dtype = sums.entries, self.logits.hidden_states.dtype
        if not self.apart:
            return _joined(sums, self.logits.head).returned(dtype)
        out = entries.view(dtype) if sums.packed else torch.empty_like(entries, dtype=dtype)
        if self.logits.engine_name == "triton":  # its kernel reads what waits as it is
            self._finish(entries, sums.scales, slice(None), out)
            return out
        for part in sums.parts(slice(0, entries.shape[0])):
            self._finish(sums.load(part), torch.ones_like(sums.scales[part]), part, out[part])
        return out

    def add_targets(self, weight: Tensor) -> None:
        """Adds to the weight's gradient what was left out of the products."""
        if self.apart:
            rows = TargetRows(self.targets, self.rest, self.rest)
            hidden, positions = self.logits.hidden_states, self.logits.positions
            add_target_rows(weight, hidden, rows, positions, self.logits.engine_name)

    def _finish(self, sums: Tensor, scales: Tensor, rows: slice, out: Tensor) -> None:
        of = TargetRows(self.targets[rows], scales, self.rest[rows])
        finish_hidden(sums, of, self.logits.head.weight, out, engine=self.logits.engine_name)

    def _as_factor(self, dz: Tensor, rows: slice, columns: slice) -> Tensor:
        dz = dz.to(self.factor.operand)
        if self.apart:
            inside, local = in_tile(self.targets[rows], columns.start, dz.shape[1])
            entries = self.factor.restore(dz.gather(1, local[:, None])[:, 0].to(self.own.dtype))
            rest = torch.where(inside, self.own[rows] - entries, self.rest[rows])
            self.rest[rows] = rest
        return dz

    def _add_hidden(
        self, sums: WaitingRows, rows: slice, dz: Tensor, weight: Tensor, *, first: bool
    ) -> None:
        for part in sums.parts(rows):
            total = sums.place(part) if first else sums.load(part)
            some = slice(part.start - rows.start, part.stop - rows.start)
            self._put(total, dz[some], weight, first=first)
            sums.keep(part, total)
            del total  # before the next one is made

    def _gradient(self, tile: RowTile, rows: slice) -> Tensor:
        state, targets = self.rows.pick(rows), self.targets[rows]
        scaled = None if self.scaled is None else self.scaled[rows]
        if self.entropy is not None:
            return tile.entropy_gradient(state, self.entropy.pick(rows), targets, scaled)
        assert scaled is not None
        return tile.gradient(state, targets, scaled)

    def _put(self, total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        """``a @ b``, a product with a tile, into a sum or where nothing is yet."""
        (self.factor.write if first else self.factor.accumulate)(total, a, b)


def _takes_targets_apart(logits: Logits) -> bool:
    """What a factor would round off from the entry of a row's target, by far the largest where
    logits are flat, is added in fp32 where no tensor has to be copied for it.

    The entry itself stays in the products: without it they, and what would be added, could cancel.
    """
    dtypes = {logits.head.weight.dtype, logits.hidden_states.dtype}
    return takes_targets_apart(logits.operand, dtypes) and logits.head.shard is None


def _joined(sums: WaitingRows, head: LmHead) -> WaitingRows:
    """The sums over all parts of the vocabulary's processes."""
    if head.shard is not None:
        for part in sums.parts(slice(0, sums.scales.shape[0])):
            total = sums.load(part)
            sum_over_shards(total, head)
            sums.keep(part, total)
            del total
    return sums


def _active(coefficients: Tensor | None, entropy: EntropyTerm | None) -> Tensor | None:
    """Tokens with a coefficient, None for all."""
    given = [coefficients, None if entropy is None else entropy.coefficients]
    marks = torch.stack([c != 0 for c in given if c is not None]).any(dim=0)
    active = marks.nonzero()[:, 0]
    return active if active.shape[0] < marks.shape[0] else None


def _among(logits: Logits, active: Tensor, rows: Tensor | None) -> Tensor | None:
    """Gradients of the rows ``active`` of all tokens among those that have none."""
    if rows is None:
        return None
    return rows.new_zeros((logits.tokens, rows.shape[1])).index_copy_(0, active, rows)
