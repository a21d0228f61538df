"""Chunks of whole pairs whose gradients of logits are kept until their loss is known.

Twice as many tokens as their logits would let in, so half as many passes over the wide sum of the
weight's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.chunks import Chunk, ChunkObjective
from fastdaa.gradient_sums import GradientSums
from fastdaa.head_plan import HeadPlan
from fastdaa.kept_products import hidden_gradient_parts, leave_out, with_entries
from fastdaa.outputs import TokenStats
from fastdaa.scaled_rows import scaled_rows
from fastdaa.score import statistics_of
from fastdaa.target_rows import TargetRows, add_column_sums, add_target_rows
from fastdaa.tiles import Logits, blocks
from fastdaa.unscaled import Unscaled


class KeptChunks:
    """One forward of a batch that does not fit: chunk after chunk into wide sums."""

    def __init__(
        self, logits: Logits, targets: Tensor, plan: HeadPlan, wanted: tuple[bool, bool, bool],
        stats: bool, longest: int,
    ):  # fmt: skip
        self.logits, self.targets, self.plan = logits, targets, plan
        self.kept = Unscaled(logits, targets, plan, min(plan.kept_tokens, longest), stats)
        self.grads = GradientSums(logits, wanted)
        self.logps: list[Tensor] = []

    @property
    def values(self) -> list[TokenStats]:
        """Token statistics of the tiles."""
        return self.kept.values

    def chunk(self, chunk: Chunk, objective: ChunkObjective) -> Tensor:
        """Losses ``[b]`` of one chunk; its gradients are added to the sums."""
        start, stop = chunk.tokens.start, chunk.tokens.stop
        parts = [
            slice(start + part.start, start + part.stop)
            for part in blocks(stop - start, self.plan.kept_tokens)
        ]
        # A pair beyond the budget is computed twice, a part at a time.
        again = len(parts) > 1
        make = self.kept.score if again else self.kept.make
        empty = self.kept.dz.new_empty(0, dtype=self.logits.wide)
        first = len(self.values)
        logps = torch.cat([make(part) for part in parts] or [empty])
        self.logps.append(logps)
        more = statistics_of(self.values[first:], empty) if self.kept.stats else None
        losses, coefficients = objective(logps, chunk, more)
        for part in parts:
            if again:
                self.kept.make(part, record=False)
            self._add(part, coefficients[part.start - start : part.stop - start])
        return losses

    def _add(self, rows: slice, coefficients: Tensor) -> None:
        dz, active = self.kept.dz[: rows.stop - rows.start], None
        if self.plan.sparse:
            dz, active = leave_out(dz, coefficients)
        if not dz.shape[0]:
            return
        hidden, grads, kept = self.logits.own_rows(rows), self.grads, self.kept
        count = coefficients.shape[0]
        of = TargetRows(
            self.targets[rows], coefficients * kept.factors[:count], coefficients * kept.own[:count]
        )
        of = of if active is None else of.pick(active)
        head = self.logits.head
        columns = slice(head.first_token, head.first_token + dz.shape[1])
        of = with_entries(of, dz, columns, head.vocab_size)
        if grads.weight is not None:
            factor = scaled_rows(hidden, of.coefficients, dz.dtype, active, self.plan.engine)
            grads.add_to_weight(dz, factor)
            add_target_rows(grads.weight, hidden, of, active, self.plan.engine, factor)
            del factor  # before the gradient of the hidden states comes
        if grads.hidden is not None:
            for part, result in hidden_gradient_parts(dz, of, kept.weight, self.plan.engine):
                at = part if active is None else active[part]
                grads.put_hidden(_after(rows.start, at), result)
                del result  # before the next one is made
        if grads.bias is not None:
            add_column_sums(grads.bias, dz, of)


def _after(start: int, rows: slice | Tensor) -> slice | Tensor:
    """Rows counted from ``start``."""
    if isinstance(rows, slice):
        return slice(start + rows.start, start + rows.stop)
    return rows + start
