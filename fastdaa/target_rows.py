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
_PART_BYTES = 4 << 20


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
    count = rows.targets.shape[0]
    order, targets, group = _grouped(rows.targets)
    own, source = rows.own[order, None], order if active is None else active[order]
    step = max(_PART_BYTES // (own.element_size() * max(count, 1)), 1)
    for start in range(0, out.shape[1], step):
        columns = slice(start, start + step)
        _add_groups(out[:, columns], hidden[:, columns][source] * own, targets, group)


def add_column_sums(out: Tensor, dz: Tensor, rows: TargetRows) -> None:
    """``out += coefficients dz``, and ``own`` at the targets: ``[V]``, wide, a slice of the
    vocabulary at a time."""
    step = max(PRODUCT_BYTES // (4 * max(dz.shape[0], 1)), 1)
    for start in range(0, dz.shape[1], step):
        columns = slice(start, start + step)
        out[columns] += rows.coefficients @ dz[:, columns].to(out.dtype)
    order, targets, group = _grouped(rows.targets)
    _add_groups(out, rows.own[order], targets, group)


def _grouped(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An order in which equal targets are neighbours, the targets in it, and the number of each
    one's group; nothing waits to learn how many groups there are."""
    targets, order = targets.sort(stable=True)
    first = torch.ones_like(targets)
    first[1:] = targets[1:] != targets[:-1]
    return order, targets, first.cumsum(0) - 1


def _add_groups(out: Tensor, parts: Tensor, targets: Tensor, group: Tensor) -> None:
    """``out[targets] += parts``, summed by group in a fixed order."""
    sums = torch.zeros_like(parts)
    if parts.device.type == "cpu":
        sums.index_add_(0, group, parts)
    else:  # in sorted order, unlike index_add_ there
        sums.index_put_((group,), parts, accumulate=True)
    total = sums.index_select(0, group).add_(out.index_select(0, targets))
    # Rows of one target are equal, so it does not matter which of them is written last.
    out.index_copy_(0, targets, total.to(out.dtype))
