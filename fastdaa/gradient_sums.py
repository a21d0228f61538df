"""Sums of the gradients of a head's inputs, from gradients of whole rows of logits.

That of the weight is wide while chunks add to it. A row of the hidden states' is made once, and
waits as :mod:`fastdaa.waiting_rows` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.call_size import packs
from fastdaa.tiles import (
    GradientFactor,
    Logits,
    accumulate,
    product,
    product_slices,
    sum_over_shards,
    write_product,
)
from fastdaa.waiting_rows import WaitingRows

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden states, weight and bias; None where not wanted."""
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype | None]
"""Theirs."""


def dtypes_of(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Dtypes:
    """In which gradients are returned."""
    return hidden_states.dtype, weight.dtype, None if bias is None else bias.dtype


class HeadSums(NamedTuple):
    """Gradients that are whole; None where not wanted."""

    hidden: WaitingRows | None
    """``[N, D]``"""
    weight: WaitingRows | None
    """``[V, D]``"""
    bias: Tensor | None
    """``[V]``, wide."""

    def fields(self) -> dict[str, Tensor | None]:
        """Their tensors, those of the rows by name, too."""
        hidden, weight = self.hidden or (None, None), self.weight or (None, None)
        return {
            "hidden": hidden[0], "hidden_scales": hidden[1],
            "weight": weight[0], "weight_scales": weight[1], "bias": self.bias,
        }  # fmt: skip

    @classmethod
    def join(cls, fields: Sequence[Tensor | None]) -> HeadSums:
        """From the values of :meth:`fields`."""
        *rows, bias = fields
        hidden, weight = (
            WaitingRows(entries, scales) if entries is not None and scales is not None else None
            for entries, scales in (rows[:2], rows[2:])
        )
        return cls(hidden, weight, bias)

    def scaled(
        self, factor: Tensor, dtypes: Dtypes, positions: Tensor | None = None, count: int = 0
    ) -> Gradients:
        """``factor`` (one number) times them, each in its dtype; the rows of the hidden states'
        added up at their positions among so many, if given."""
        hidden, weight, bias = dtypes
        by_hidden = None
        if self.hidden is not None and positions is None:
            by_hidden = self.hidden.scaled(factor, hidden)
        elif self.hidden is not None and positions is not None:
            by_hidden = self.hidden.scattered(factor, hidden, positions, count)
        return (
            by_hidden,
            None if self.weight is None else self.weight.scaled(factor, weight),
            None if self.bias is None else (self.bias * factor).to(bias),
        )

    def returned(self, dtypes: Dtypes) -> Gradients:
        """They themselves, each in its dtype; not to be used any more."""
        hidden, weight, bias = dtypes
        return (
            None if self.hidden is None else self.hidden.returned(hidden),
            None if self.weight is None else self.weight.returned(weight),
            None if self.bias is None else self.bias.to(bias),
        )


class GradientSums:
    """Sums of the gradients of hidden states, weight and bias while tiles contribute to them."""

    def __init__(self, logits: Logits, wanted: tuple[bool, bool, bool]):
        hidden, head, wide = logits.hidden_states, logits.head, logits.wide
        self.hidden = self.weight = self.bias = None
        if wanted[0]:
            packed, rows = packs(hidden.dtype), logits.tokens
            self.hidden = WaitingRows.empty(hidden, wide, packed=packed, rows=rows)
            self.hidden.entries.zero_()  # rows that are left out
        if wanted[1]:
            self.weight = head.weight.new_empty(head.weight.shape, dtype=wide)
        if wanted[2] and head.bias is not None:
            self.bias = torch.zeros_like(head.bias, dtype=wide)
        self.head, self.column_sums = head, logits.engine.column_sums
        self._begun = False  # the first product takes the place of zeros in the weight's sum

    def add(
        self, dz: Tensor, factor: GradientFactor, hidden: Tensor, weight: Tensor,
        rows: slice | Tensor,
    ) -> None:  # fmt: skip
        """Add what a gradient tile ``dz [r, V]`` made with scaled coefficients contributes.

        Args:
            hidden: ``[r, D]`` and weight ``[V, D]`` are factors.
            rows: of the hidden states; no two tiles have the same.
        """
        if self.bias is not None:
            self.bias += factor.restore(self.column_sums(dz))
        tile = dz.to(factor.operand)
        if self.hidden is not None:
            if isinstance(rows, slice):
                for at in self.hidden.parts(rows):
                    place = self.hidden.place(at)
                    factor.write(place, tile[at.start - rows.start : at.stop - rows.start], weight)
                    sum_over_shards(place, self.head)
                    self.hidden.keep(at, place)
                    del place  # before the next one is made
            else:
                for part in product_slices(hidden):
                    values = factor.restore(product(tile[part], weight))
                    self.put_hidden(rows[part], values)
                    del values
        if self.weight is not None:
            (factor.accumulate if self._begun else factor.write)(self.weight, tile.T, hidden)
            self._begun = True

    def put_hidden(self, rows: slice | Tensor, values: Tensor) -> None:
        """Take this process's part of rows ``[r, D]`` of the hidden states' gradient."""
        if self.hidden is not None:
            sum_over_shards(values, self.head)
            self.hidden.put(rows, values)

    def add_to_weight(self, dz: Tensor, factor: Tensor) -> None:
        """Add ``dz^T factor`` to the weight's sum alone, if it is wanted."""
        if self.weight is not None:
            (accumulate if self._begun else write_product)(self.weight, dz.T, factor)
            self._begun = True

    def finish(self, *, waits: bool) -> HeadSums:
        """After the last tile; ``waits``: the weight's gradient waits for backward, too."""
        weight, self.weight = self.weight, None
        if weight is None:
            return HeadSums(self.hidden, None, self.bias)
        if not self._begun:
            weight.zero_()
        dtype = self.head.weight.dtype if waits else weight.dtype
        return HeadSums(self.hidden, WaitingRows.of(weight, dtype), self.bias)
