"""What the entries of targets contribute to the gradients of a head.

``d logp / d z`` is ``1 - p`` at the target, by far the largest entry of its row where logits are
flat. A factor of a product in half precision would round it, so it is added in fp32: all of it, or
what the product of rounded factors lacks of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.slices import PRODUCT_BYTES

# Rows are added in parts of this many bytes; five tensors of that size are alive at a time.
_PART_BYTES = 4 << 20


class TargetRows(NamedTuple):
    """Targets of rows of gradients and what scales the rows, all ``[a]``."""

    targets: Tensor
    """int64 token ids."""
    coefficients: Tensor
    """Wide: the factor of all entries except the target's."""
    own: Tensor
    """Wide: the entry of the target."""
    entries: Tensor | None = None
    """Wide: what stands in its place in the product's factor, which ``coefficients`` multiply; None
    for 0."""

    @property
    def rest(self) -> Tensor:
        """What the product's factor lacks of the entry of the target."""
        return self.own if self.entries is None else self.own - self.coefficients * self.entries

    def pick(self, rows: slice | Tensor) -> TargetRows:
        """The same for some rows."""
        return TargetRows(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]

    def among(self, columns: slice) -> TargetRows:
        """The same for some entries of the vocabulary: targets elsewhere add 0."""
        width = columns.stop - columns.start
        local = self.targets - columns.start
        inside = (local >= 0) & (local < width)
        # Each to another row: many on one would take long.
        elsewhere = torch.arange(local.shape[0], device=local.device) % width
        return TargetRows(
            torch.where(inside, local, elsewhere),
            self.coefficients,
            torch.where(inside, self.own, 0.0),
            None if self.entries is None else torch.where(inside, self.entries, 0.0),
        )


def add_target_rows(
    out: Tensor, hidden: Tensor, rows: TargetRows, active: Tensor | None = None,
    engine: str = "torch", factor: Tensor | None = None,
) -> None:  # fmt: skip
    """``out[targets] += own * hidden - entries * factor``, rounded once: what a product with the
    ``factor``, which is ``coefficients * hidden`` rounded, lacks of the targets' part.

    Rows with the same target are first summed in their order, in the wide dtype.

    Args:
        out: ``[V, D]``. hidden: ``[N, D]``. rows: ``[a]``.
        active: ``[a]``: which hidden states the rows belong to, None for all.
        engine: ``"torch"``, or ``"triton"`` for its kernel.
        factor: ``[a, D]``, where rows have ``entries``.
    """
    assert (rows.entries is None) == (factor is None)
    if engine == "triton":
        from fastdaa.kernels.target_rows import add_sorted_rows

        targets, order = rows.targets.sort(stable=True)
        source = order if active is None else active[order]
        less = None
        if factor is not None and rows.entries is not None:
            less = factor, order, rows.entries[order]
        add_sorted_rows(out, hidden, targets, source, rows.own[order], less)
        return
    groups = _Groups(rows.targets)
    own, source = rows.own[groups.order, None], groups.order
    entries = None if rows.entries is None else rows.entries[groups.order, None]
    source = source if active is None else active[source]
    step = max(_PART_BYTES // (own.element_size() * max(own.shape[0], 1)), 1)
    for start in range(0, out.shape[1], step):
        columns = slice(start, start + step)
        parts = hidden[:, columns][source] * own
        if factor is not None and entries is not None:
            parts.addcmul_(factor[:, columns][groups.order], entries, value=-1)
        groups.add(out[:, columns], parts)


def finish_hidden(
    result: Tensor, rows: TargetRows, weight: Tensor, out: Tensor | None = None,
    places: Tensor | None = None, engine: str = "torch",
) -> None:  # fmt: skip
    """``coefficients * result + rest * weight[targets]``, rounded once.

    Args:
        result: ``[a, D]``, wide: a product with gradients that have the ``entries`` of the rows at
            their targets. Not to be used afterwards, unless there is no ``out``.
        weight: ``[V, D]``. rows: ``[a]``; those with ``own`` 0 may have any target.
        out: ``[N, D]``; None for ``result`` itself.
        places: ``[a]`` rows of ``out``, None for its first ones.
        engine: ``"torch"``, or ``"triton"`` for its kernel.
    """
    rows = rows._replace(own=rows.rest, entries=None)
    if engine == "triton":
        from fastdaa.kernels.hidden_rows import finish_hidden_rows

        place = result if out is None else out
        finish_hidden_rows(result, rows.coefficients, rows.own, weight, rows.targets, place, places)
        return
    few = _few_rows(result.shape[1], result.element_size())
    for start in range(0, result.shape[0], few):
        some = slice(start, min(start + few, result.shape[0]))
        these, ours = rows.pick(some), result[some]
        ours.mul_(these.coefficients[:, None])
        ours.addcmul_(these.own[:, None], weight[these.targets])
        if out is not None and places is None:
            out[some] = ours
        elif out is not None and places is not None:
            out.index_copy_(0, places[some], ours.to(out.dtype))


def _few_rows(hidden_size: int, wide: int) -> int:
    return max(_PART_BYTES // (wide * max(hidden_size, 1)), 1)


def held_by_finished_rows(rows: int, hidden_size: int, wide: int, narrow: int, engine: str) -> int:
    """Bytes that :func:`finish_hidden` takes for rows of a weight of ``narrow`` bytes an entry."""
    few = min(rows, _few_rows(hidden_size, wide))
    return 0 if engine == "triton" else narrow * hidden_size * few


def held_by_target_rows(rows: int, hidden_size: int, wide: int, engine: str) -> int:
    """Bytes that :func:`add_target_rows` takes, for entries of ``wide`` bytes, beside vectors."""
    return 0 if engine == "triton" else 5 * min(_PART_BYTES, wide * rows * hidden_size)


def add_column_sums(out: Tensor, dz: Tensor, rows: TargetRows) -> None:
    """``out += coefficients @ dz``, and the ``rest`` at the targets, for the gradient ``[V]`` of a
    bias.

    Wide, a slice of the vocabulary at a time.
    """
    step = max(PRODUCT_BYTES // (4 * max(dz.shape[0], 1)), 1)
    for start in range(0, dz.shape[1], step):
        columns = slice(start, start + step)
        out[columns] += rows.coefficients @ dz[:, columns].to(out.dtype)
    groups = _Groups(rows.targets)
    groups.add(out, rows.rest[groups.order])


class _Groups:
    """Rows ``[a]`` grouped by their target, without a wait for the number of groups."""

    def __init__(self, targets: Tensor):
        self.targets, self.order = targets.sort(stable=True)
        first = torch.ones_like(targets)
        first[1:] = self.targets[1:] != self.targets[:-1]
        self.group = first.cumsum(0) - 1
        # As many as there could be, those at the end empty.
        self.lengths = torch.zeros_like(targets).index_add_(0, self.group, torch.ones_like(targets))

    def add(self, out: Tensor, parts: Tensor) -> None:
        """``out[targets] += parts``, those of a target summed in their order."""
        # unsafe skips a check of the lengths that would wait for the device.
        sums = torch.segment_reduce(parts, "sum", lengths=self.lengths, unsafe=True)
        total = sums.index_select(0, self.group).add_(out.index_select(0, self.targets))
        # Rows of one target are equal, so it does not matter which of them is written last.
        out.index_copy_(0, self.targets, total.to(out.dtype))
