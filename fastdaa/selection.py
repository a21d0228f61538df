"""Which positions are scored, against which tokens, for which sequence.

A causal LM's hidden state at position ``t`` predicts the token at ``t + 1``; labels keep the
position of their token (the Hugging Face convention), so the token at position 0 is never scored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa.compiled_sizes import HOST_READS, size_from_data
from fastdaa.outputs import TokenSelection
from fastdaa.validation import check_choice, check_indices

ORDERS = ("chosen_first", "interleaved")


def select_tokens(labels: Tensor, ignore_index: int = -100) -> TokenSelection:
    """Select every labelled token, sequence by sequence.

    Args:
        labels: ``[S, T]`` int64; the token id where it is scored, ``ignore_index`` elsewhere.
        ignore_index: the value that marks positions which are not scored. It must not be a
            valid token id.

    Returns:
        The selection into hidden states flattened to ``[S * T, D]``.

    Raises:
        TypeError, ValueError: labels that are not int64 of two dimensions, or a non-negative
            ``ignore_index``.

    Labels on a device cost one host synchronisation (the number of scored tokens depends on the
    data). Select on the CPU, in the collator, and move the selection instead.
    """
    _check_labels(labels, ignore_index)
    everything = torch.arange(labels.shape[0], device=labels.device)
    return _select_in_order(labels, everything, ignore_index)


def select_pairs(
    labels: Tensor, *, order: str = "chosen_first", ignore_index: int = -100
) -> TokenSelection:
    """Select the labelled tokens of preference pairs, pair by pair.

    Args:
        labels: ``[2B, T]`` int64, as in :func:`select_tokens`.
        order: how the rows are ordered: ``"chosen_first"`` for ``[all chosen; all rejected]``
            (TRL, Liger), ``"interleaved"`` for ``chosen_0, rejected_0, chosen_1, ...``.
        ignore_index: the value that marks positions which are not scored.

    Returns:
        A pair-major selection: sequence ``2i`` is the chosen, ``2i + 1`` the rejected completion
        of pair ``i``, whatever ``order`` was. Its rows index ``[2B * T, D]``. In a graph of
        ``torch.compile`` it is one node, and its counts, which the host does not know, are empty.

    Raises:
        TypeError, ValueError: as :func:`select_tokens`, an odd number of rows, an unknown order.
    """
    _check_labels(labels, ignore_index)
    check_choice("order", order, ORDERS)
    sequences = labels.shape[0]
    if sequences % 2:
        raise ValueError(f"labels: expected 2B rows (chosen and rejected), got {sequences}")
    return pairs_in_order(labels, order, ignore_index, shift=1)


def moved(selection: TokenSelection, device: torch.device) -> TokenSelection:
    """``selection.to(device)``, which Dynamo of torch 2.8, taking no method of a NamedTuple, can
    trace."""
    rows, targets, lengths, counts = selection
    return TokenSelection(rows.to(device), targets.to(device), lengths.to(device), counts)


def pairs_in_order(labels: Tensor, order: str, ignore_index: int, shift: int) -> TokenSelection:
    """:func:`select_pairs` of checked labels, whose tokens are predicted ``shift`` positions before
    them."""
    if torch.compiler.is_compiling():
        rows, targets, lengths = _select_pairs(labels, order, ignore_index, shift)
        return TokenSelection(rows, targets, lengths, ())
    return _pairs_in_order(labels, order, ignore_index, shift)


def select_rows(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """``hidden_states[rows]`` of ``[P, D]`` and ``[N]``, with a gradient of ``N D`` and ``P D``
    entries.

    That of ``index_select`` takes ``P D`` more while it is made.
    """
    selected: Tensor = _SelectRows.apply(hidden_states, rows)
    return selected


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, rows: Tensor) -> Tensor:
        ctx.positions = hidden_states.shape[0]
        ctx.save_for_backward(rows)
        return hidden_states.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        whole = grad.new_zeros(ctx.positions, grad.shape[1])
        return whole.index_add_(0, rows, grad), None


def _check_labels(labels: Tensor, ignore_index: int) -> None:
    check_indices("labels", labels, tuple(getattr(labels, "shape", ())))
    if labels.ndim != 2:
        raise ValueError(f"labels: expected shape [S, T], got {list(labels.shape)}")
    check_ignore_index(ignore_index)


def check_ignore_index(ignore_index: int) -> None:
    """Raise ``TypeError`` for no integer, ``ValueError`` for one that a token id could be."""
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    if ignore_index >= 0:
        raise ValueError(
            f"ignore_index: expected a negative number, got {ignore_index}, which is a token id"
        )


@torch.library.custom_op("fastdaa::select_pairs", mutates_args=(), tags=HOST_READS)
def _select_pairs(
    labels: Tensor, order: str, ignore_index: int, shift: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[N]``, targets ``[N]`` and lengths ``[2B]`` of :func:`pairs_in_order`."""
    return _pairs_in_order(labels, order, ignore_index, shift)[:3]


@_select_pairs.register_fake
def _(labels: Tensor, order: str, ignore_index: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = size_from_data()
    return (
        labels.new_empty(tokens), labels.new_empty(tokens), labels.new_empty(labels.shape[0]),
    )  # fmt: skip


def _pairs_in_order(labels: Tensor, order: str, ignore_index: int, shift: int) -> TokenSelection:
    permutation = torch.arange(labels.shape[0], device=labels.device)
    if order == "chosen_first":
        permutation = permutation.view(2, -1).T.reshape(-1)
    return _select_in_order(labels, permutation, ignore_index, shift)


def _select_in_order(
    labels: Tensor, permutation: Tensor, ignore_index: int, shift: int = 1
) -> TokenSelection:
    shifted = labels.index_select(0, permutation)[:, shift:]
    scored = shifted != ignore_index
    sequence, position = scored.nonzero(as_tuple=True)
    rows = permutation[sequence] * labels.shape[1] + position
    lengths = scored.sum(dim=1)
    return TokenSelection(rows, shifted[scored], lengths, tuple(lengths.tolist()))
