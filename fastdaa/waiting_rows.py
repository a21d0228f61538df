"""``[N, D]`` gradients that wait, in the bytes that they are returned in.

A bf16 gradient has 8 significant bits. Until it is rounded to them its entries wait in fp16, which
has 11, with a power of two for every row that brings it into fp16's range: 2 bytes an entry in the
place of 4. Being rounded twice, a result is off by 1.67e-3 in the place of 1.66e-3 (root mean
squares, relative); one that is summed in fp16 is rounded with every part. Other dtypes wait in the
wide one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.call_size import packs
from fastdaa.tiles import blocks, product_slices

# The largest entry of a row in fp16, whose own largest is 65504.
_LARGEST = 32768.0
_SMALLEST, _HUGE = 2.0**-100, 2.0**127
# Rows are added at their positions in parts of so many bytes of fp32.
_PART_BYTES = 8 << 20


class WaitingRows(NamedTuple):
    """Rows ``entries * scales[:, None]``."""

    entries: Tensor
    """``[N, D]``, fp16 or wide."""
    scales: Tensor
    """``[N]``, wide; 1 where entries are."""

    @classmethod
    def empty(
        cls, like: Tensor, wide: torch.dtype, *, packed: bool, rows: int | None = None
    ) -> WaitingRows:
        """Without values yet: as many as ``like`` has, or another number of them."""
        rows = like.shape[0] if rows is None else rows
        dtype = torch.float16 if packed else wide
        entries = like.new_empty((rows, like.shape[1]), dtype=dtype)
        return cls(entries, like.new_ones(rows, dtype=wide))

    @classmethod
    def of(cls, sums: Tensor, dtype: torch.dtype) -> WaitingRows:
        """Wide sums ``[N, D]`` that are returned in ``dtype``."""
        if not packs(dtype):
            return cls(sums, sums.new_ones(sums.shape[0]))
        rows = cls.empty(sums, sums.dtype, packed=True)
        for part in product_slices(sums):
            rows.keep(part, sums[part])
        return rows

    @property
    def packed(self) -> bool:
        return self.entries.dtype != self.scales.dtype

    def parts(self, rows: slice) -> Iterator[slice]:
        """Slices of some rows, such that what is wide of one is small."""
        if not self.packed:
            yield rows
            return
        for part in product_slices(self.entries[rows]):
            yield slice(rows.start + part.start, rows.start + part.stop)

    def place(self, rows: slice) -> Tensor:
        """Wide memory ``[r, D]`` to write values to, for :meth:`keep`."""
        entries = self.entries[rows]
        return torch.empty_like(entries, dtype=self.scales.dtype) if self.packed else entries

    def load(self, rows: slice) -> Tensor:
        """Wide values ``[r, D]`` to change, for :meth:`keep`."""
        place = self.place(rows)
        return self.times(rows, self.scales[rows], place) if self.packed else place

    def keep(self, rows: slice, values: Tensor) -> None:
        """Take what was written to memory from :meth:`place` or :meth:`load`."""
        if self.packed:
            torch.mul(values, self._lift(rows, values), out=self.entries[rows])

    def put(self, rows: slice | Tensor, values: Tensor) -> None:
        """Take wide values ``[r, D]`` from elsewhere, which are given up."""
        if self.packed:
            values = values.mul_(self._lift(rows, values))
        self.entries[rows] = values.to(self.entries.dtype)

    def _lift(self, rows: slice | Tensor, values: Tensor) -> Tensor:
        """What brings values into the range of fp16, ``[r, 1]``; the scales undo it."""
        if not values.numel():
            return values.new_ones((values.shape[0], 1))
        largest = torch.linalg.vector_norm(values, ord=float("inf"), dim=1)
        # Infinity stays so, and so does NaN: it becomes the scale of its row.
        largest.clamp_(min=_SMALLEST, max=_HUGE)
        lift = torch.div(_LARGEST, largest).log2_().floor_().exp2_()
        self.scales[rows] = lift.reciprocal()
        return lift[:, None]

    def scaled(self, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """``coefficients [N]``, or one, times the rows: ``[N, D]``, rounded to ``dtype``."""
        out = torch.empty_like(self.entries, dtype=dtype)
        return self.times(slice(None), coefficients * self.scales, out)

    def scattered(
        self, coefficients: Tensor, dtype: torch.dtype, positions: Tensor, count: int
    ) -> Tensor:
        """The same, added up at the ``positions [N]`` of ``[count, D]``."""
        out = self.entries.new_zeros((count, self.entries.shape[1]), dtype=dtype)
        factors = coefficients * self.scales
        few = max(_PART_BYTES // (4 * max(self.entries.shape[1], 1)), 1)
        for part in blocks(self.entries.shape[0], few):
            values = torch.empty_like(self.entries[part], dtype=dtype)
            out.index_add_(0, positions[part], self.times(part, factors[part], values))
            del values  # before the next ones are made
        return out

    def times(self, rows: slice, factors: Tensor, out: Tensor) -> Tensor:
        """``factors [r]`` times the entries of some rows."""
        # Into the dtype of the result at once: a product of its own would be a second [N, D].
        return torch.mul(self.entries[rows], factors[:, None], out=out)

    def returned(self, dtype: torch.dtype) -> Tensor:
        """The rows in ``dtype``; not to be used any more: it may be their own memory."""
        if not self.packed:
            return self.entries.to(dtype)
        out = self.entries.view(dtype)
        for part in product_slices(self.entries):
            out[part] = self.load(part)
        return out
