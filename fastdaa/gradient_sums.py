"""Wide sums of the gradients of a head's inputs, from gradients of whole rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.tiles import (
    GradientFactor,
    Logits,
    accumulate,
    product,
    product_slices,
    sum_over_shards,
    write_product,
)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden states, weight and bias; None where not wanted."""


def rounded(sums: Gradients, tensors: tuple[Tensor, Tensor, Tensor | None]) -> Gradients:
    """The sums in the dtypes of their tensors."""
    return tuple(  # type: ignore[return-value]
        total if total is None or t is None else total.to(t.dtype)
        for total, t in zip(sums, tensors, strict=True)
    )


class GradientSums:
    """Wide sums of the gradients of hidden states, weight and bias; None where not wanted."""

    def __init__(self, logits: Logits, wanted: tuple[bool, bool, bool]):
        tensors = (logits.hidden_states, logits.head.weight, logits.head.bias)
        makers = (torch.zeros_like, torch.empty_like, torch.zeros_like)
        self.hidden, self.weight, self.bias = (
            make(t, dtype=logits.wide) if want and t is not None else None
            for make, t, want in zip(makers, tensors, wanted, strict=True)
        )
        self.head, self.column_sums = logits.head, logits.engine.column_sums
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
                factor.write(self.hidden[rows], tile, weight)
            else:
                for part in product_slices(self.hidden[: tile.shape[0]]):
                    self.hidden[rows[part]] = factor.restore(product(tile[part], weight))
        if self.weight is not None:
            (factor.accumulate if self._begun else factor.write)(self.weight, tile.T, hidden)
            self._begun = True

    def add_to_weight(self, dz: Tensor, factor: Tensor) -> None:
        """Add ``dz^T factor`` to the weight's sum alone, if it is wanted."""
        if self.weight is not None:
            (accumulate if self._begun else write_product)(self.weight, dz.T, factor)
            self._begun = True

    def finish(self) -> Gradients:
        """After the last tile: what other processes' parts of the vocabulary contribute."""
        if self.hidden is not None:
            sum_over_shards(self.hidden, self.head)
        if self.weight is not None and not self._begun:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias
