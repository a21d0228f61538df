"""Which positions are scored, against which tokens, for which sequence.

A causal LM's hidden state at position ``t`` predicts the token at ``t + 1``; labels keep the
position of their token (the Hugging Face convention), so the token at position 0 is never scored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.outputs import TokenSelection
from fastdaa.validation import check_choice, check_indices


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
    return _select_in_order(labels, torch.arange(labels.shape[0]), ignore_index)


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
        of pair ``i``, whatever ``order`` was. Its rows index ``[2B * T, D]``.

    Raises:
        TypeError, ValueError: as :func:`select_tokens`, an odd number of rows, an unknown order.
    """
    _check_labels(labels, ignore_index)
    check_choice("order", order, ("chosen_first", "interleaved"))
    sequences = labels.shape[0]
    if sequences % 2:
        raise ValueError(f"labels: expected 2B rows (chosen and rejected), got {sequences}")
    permutation = torch.arange(sequences)
    if order == "chosen_first":
        permutation = permutation.view(2, -1).T.reshape(-1)
    return _select_in_order(labels, permutation, ignore_index)


def _check_labels(labels: Tensor, ignore_index: int) -> None:
    check_indices("labels", labels, tuple(getattr(labels, "shape", ())))
    if labels.ndim != 2:
        raise ValueError(f"labels: expected shape [S, T], got {list(labels.shape)}")
    if ignore_index >= 0:
        raise ValueError(
            f"ignore_index: expected a negative number, got {ignore_index}, which is a token id"
        )


def _select_in_order(labels: Tensor, permutation: Tensor, ignore_index: int) -> TokenSelection:
    permutation = permutation.to(labels.device)
    shifted = labels.index_select(0, permutation)[:, 1:]
    scored = shifted != ignore_index
    sequence, position = scored.nonzero(as_tuple=True)
    rows = permutation[sequence] * labels.shape[1] + position
    lengths = scored.sum(dim=1)
    return TokenSelection(rows, shifted[scored], lengths, tuple(lengths.tolist()))
