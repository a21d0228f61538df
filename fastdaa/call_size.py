"""Sizes and dtypes of one call on the head, and what its parts take in bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch

_HALVES = (torch.float16, torch.bfloat16)


def packs(dtype: torch.dtype) -> bool:
    """Gradients that are returned in ``dtype`` wait in fp16, see :mod:`fastdaa.waiting_rows`."""
    return dtype == torch.bfloat16


def takes_targets_apart(operand: torch.dtype, dtypes: set[torch.dtype]) -> bool:
    """``recompute`` adds what rounding to these factors takes from the targets' entries, where the
    tensors have these ``dtypes``."""
    return operand in _HALVES and dtypes == {operand}


class CallSize(NamedTuple):
    """Sizes and dtypes of one call."""

    width: int
    """Rows of the weight."""
    hidden_size: int = 0
    """``D``; 0 where it is not known, and nothing but tiles is counted."""
    tokens: int = 0
    """``N`` scored tokens; 0 where it is not known."""
    operand: torch.dtype = torch.float32
    """Dtype of the factors of the products."""
    weight_dtype: torch.dtype | None = None
    """None for ``operand``."""
    hidden_dtype: torch.dtype | None = None
    """None for ``operand``."""
    softcap: bool = False
    """The head has one."""
    stats: bool = False
    """Token statistics are wanted."""
    sparse: bool = False
    """Tokens with a coefficient of 0 are left out of products: the others' rows are copied."""
    selected: bool = False
    """The rows are selected from hidden states of more positions: a copy, as is their gradient."""
    hidden_grad: bool = True
    """A gradient of the hidden states is wanted."""
    head_grad: bool = True
    """A gradient of weight or bias is wanted."""
    entropy: bool = False
    """The gradient is that of entropies: probabilities beside their logs."""
    gathered: bool = False
    """Selected rows are copied as they are needed, but where gradients of the logits are kept until
    backward."""
    bonus: bool = False
    """The gradient of entropies joins that of log-probs."""

    @property
    def wide(self) -> int:
        """Bytes of a logit."""
        return 8 if self.operand == torch.float64 else 4

    @property
    def narrow(self) -> int:
        """Bytes of a factor."""
        return self.operand.itemsize

    @property
    def half(self) -> bool:
        """Products have half-precision factors."""
        return self.operand in _HALVES

    @property
    def hidden_sum(self) -> int:
        """Bytes of a wide gradient ``[N, D]`` of the hidden states, if it is wanted."""
        return self.wide * self.tokens * self.hidden_size * self.hidden_grad

    @property
    def own_rows(self) -> int:
        """Bytes of ``[N, D]`` in the dtype of the hidden states."""
        return self.own_hidden.itemsize * self.tokens * self.hidden_size

    @property
    def waiting_hidden(self) -> int:
        """Bytes of a gradient of the hidden states that waits for backward."""
        return self.own_rows * self.hidden_grad if packs(self.own_hidden) else self.hidden_sum

    @property
    def waiting_weight(self) -> int:
        """The same of the weight."""
        return self.weight_sum // 2 if packs(self.own_weight) else self.weight_sum

    @property
    def weight_entries(self) -> int:
        """Of a gradient ``[V, D]`` of the weight, if it is wanted."""
        return self.width * self.hidden_size * self.head_grad

    @property
    def weight_sum(self) -> int:
        """Bytes of that gradient, wide."""
        return self.wide * self.weight_entries

    @property
    def own_hidden(self) -> torch.dtype:
        """Dtype of the hidden states."""
        return self.hidden_dtype or self.operand

    @property
    def own_weight(self) -> torch.dtype:
        """Dtype of the weight."""
        return self.weight_dtype or self.operand

    @property
    def slice_entry(self) -> int:
        """Bytes of an entry of a slice of the weight's gradient that is summed before it is
        rounded, and of the slice of the weight as a factor where that is a copy."""
        summed = self.head_grad and self.own_weight.itemsize != self.wide
        return self.wide * summed + self.slice_copy

    @property
    def slice_copy(self) -> int:
        """Bytes of an entry of the weight as a factor, where its own dtype is another."""
        return 0 if self.own_weight == self.operand else self.narrow

    @property
    def weight_copy(self) -> int:
        """The same of the whole weight."""
        return self.slice_copy * self.width * self.hidden_size

    @property
    def row_copy(self) -> int:
        """Bytes of a row of hidden states as a factor, where its own dtype is another."""
        return 0 if self.own_hidden == self.operand else self.narrow * self.hidden_size

    @property
    def picked_row(self) -> int:
        """Bytes of a copy of a row of hidden states, where some of them are left out."""
        return self.own_hidden.itemsize * self.hidden_size if self.sparse else 0

    @property
    def gathered_row(self) -> int:
        """Bytes of a copy of a row of hidden states, where it is copied as it is needed."""
        return self.own_hidden.itemsize * self.hidden_size * (self.gathered or self.sparse)

    @property
    def selection(self) -> int:
        """Bytes of the copy of the selected rows, and of its gradient."""
        return 0 if self.gathered else self.kept_selection

    @property
    def kept_selection(self) -> int:
        """The same where gradients of the logits are kept until backward."""
        return self.own_rows if self.selected else 0


def statistics_entry(size: CallSize, engine: str, *, slope: bool = False) -> int:
    """Bytes of a logit while statistics are taken; ``slope``: a gradient follows."""
    if engine != "torch":
        return size.wide
    return size.wide * (1 + size.stats + (slope and size.softcap))


def gradient_entry(size: CallSize, engine: str) -> int:
    """Bytes of a logit while its gradient is made, and then handed to a product."""
    if engine != "torch":
        return size.wide
    if size.entropy:
        return size.wide * (2 + size.softcap)
    return size.wide + max(size.wide * size.softcap, size.narrow * size.half)


def slopes_row(size: CallSize, engine: str) -> int:
    """Bytes of a row of logits whose statistics and gradient are taken one after the other."""
    entry = max(statistics_entry(size, engine, slope=True), gradient_entry(size, engine))
    return size.row_copy + size.width * entry


def gradient_row(size: CallSize, engine: str) -> int:
    """The same where what statistics left is held until the gradient has been a factor."""
    row = slopes_row(size, engine)
    if engine == "torch" and size.softcap:
        row = max(row, size.row_copy + size.width * (2 * size.wide + size.narrow * size.half))
    return row
