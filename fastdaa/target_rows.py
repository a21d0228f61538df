"""What the entries of targets contribute to the gradients of a head.

``d logp / d z`` is ``1 - p`` at the target, by far the largest entry of its row where logits are
flat. A factor of a product in half precision would round it, so it is added in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.slices import PRODUCT_BYTES

# Bytes of parts of rows that are added at a time: of five tensors of that size.
_PART_BYTES = 16 << 20


class TargetRows(NamedTuple):
    """Numbers ``[a]`` of rows of gradients, wide, and their targets."""

    targets: Tensor
    """int64."""
    coefficients: Tensor
    """Of the entries beside the target."""
    own: Tensor
    """The entry of the target."""

    def pick(self, rows: slice | Tensor) -> TargetRows:
        """Those of some rows."""
        return TargetRows(self.targets[rows], self.coefficients[rows], self.own[rows])


def add_target_rows(
    out: Tensor, hidden: Tensor, rows: TargetRows, active: Tensor | None = None
) -> None:
    """``out[targets] += own * hidden``: rows with the same target are summed in their order, in the
    wide dtype, and added to ``out [V, D]`` at once, rounded once.

    Args:
        hidden: ``[N, D]``. rows: ``[a]``. active: ``[a]`` which of the hidden states, None for all.
    """
    groups = _Groups(rows.targets)
    own, source = rows.own[groups.order, None], groups.order
    source = source if active is None else active[source]
    step = max(_PART_BYTES // (own.element_size() * max(own.shape[0], 1)), 1)
    for start in range(0, out.shape[1], step):
        columns = slice(start, start + step)
        groups.add(out[:, columns], hidden[:, columns][source] * own)


def held_by_target_rows(rows: int, hidden_size: int, wide: int) -> int:
    """Bytes that :func:`add_target_rows` takes, for entries of ``wide`` bytes."""
    return 5 * min(_PART_BYTES, wide * rows * hidden_size)


def add_column_sums(out: Tensor, dz: Tensor, rows: TargetRows) -> None:
    """``out += coefficients dz``, and ``own`` at the targets: ``[V]``, wide, a slice of the
    vocabulary at a time."""
    step = max(PRODUCT_BYTES // (4 * max(dz.shape[0], 1)), 1)
    for start in range(0, dz.shape[1], step):
        columns = slice(start, start + step)
        out[columns] += rows.coefficients @ dz[:, columns].to(out.dtype)
    groups = _Groups(rows.targets)
    groups.add(out, rows.own[groups.order])


class _Groups:
    """Rows ``[a]`` with the same target. Nothing waits to learn how many there are."""

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
