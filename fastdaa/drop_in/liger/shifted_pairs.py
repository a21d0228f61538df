"""Liger's batches: targets shifted by the caller; pairs are ``[all chosen; all rejected]``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.head import LmHead
from fastdaa.logps import head_logps, head_logps_and_stats, pair_logps, sequence_logps
from fastdaa.outputs import PairLogps, TokenSelection
from fastdaa.selection import pairs_in_order
from fastdaa.validation import (
    check_head_inputs,
    check_indices,
    check_positions,
    check_readable,
)


def select_shifted_pairs(target: Tensor, ignore_index: int) -> TokenSelection:
    """Select the scored tokens of ``target [2B, T]`` int64, pair by pair.

    Unlike :func:`fastdaa.select_pairs`, position ``t`` of a row is predicted by the hidden state at
    position ``t``, and ``ignore_index`` may be any number. Costs one host synchronisation on a
    device.

    Raises:
        TypeError, ValueError: a target that is not int64 of two dimensions, or an odd number of
            rows.
    """
    _check_target(target)
    if target.ndim != 2 or target.shape[0] % 2 or not target.shape[0]:
        raise ValueError(
            f"target: expected shape [2B, T], all chosen and then all rejected, got "
            f"{list(target.shape)}"
        )
    return pairs_in_order(target, "chosen_first", ignore_index, shift=0)


def select_shifted_rows(target: Tensor, ignore_index: int) -> TokenSelection:
    """The same of single completions, ``target [B, T]``, row by row."""
    _check_target(target)
    if target.ndim != 2 or not target.shape[0]:
        raise ValueError(f"target: expected shape [B, T], got {list(target.shape)}")
    return pairs_in_order(target, "interleaved", ignore_index, shift=0)  # the rows as they come


def _check_target(target: Tensor) -> None:
    check_indices("target", target, tuple(getattr(target, "shape", ())))
    check_readable("target", target)


def selected_sums(hidden_states: Tensor, head: LmHead, selection: TokenSelection) -> PairLogps:
    """:func:`row_sums` of the pairs of ``hidden_states [2B, T, D]``."""
    return pair_logps(row_sums(hidden_states, head, selection), selection.lengths)


def row_sums(hidden_states: Tensor, head: LmHead, selection: TokenSelection) -> Tensor:
    """Summed log-probs ``[S]`` of the rows of ``hidden_states [S, T, D]``, as they are selected;
    differentiable.

    3U with a trained head, where the gradients of all logits fit in memory, else 4U.

    Raises:
        TypeError, ValueError: tensors that do not fit together.
    """
    rows = hidden_states.flatten(0, 1).index_select(0, selection.rows)
    check_head_inputs(rows, head.weight, selection.targets, head.bias)
    if torch.compiler.is_compiling():
        logps = head_logps(rows, head, selection.targets)
    else:
        logps, _ = head_logps_and_stats(rows, head, selection.targets, keep=True, selected=True)
    return sequence_logps(logps, selection.lengths)


def reference_head(
    ref_input: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, target: Tensor
) -> tuple[Tensor, LmHead]:
    """Hidden states and head of a reference that is wanted.

    Raises:
        ValueError: one of them is missing, or the hidden states are not of the target's positions.
    """
    if ref_input is None or ref_weight is None:
        missing = "ref_input" if ref_input is None else "ref_weight"
        raise ValueError(f"{missing}: expected a tensor with use_ref_model=True, got None")
    check_positions("ref_input", ref_input, target.shape)
    return ref_input, LmHead(ref_weight, ref_bias)


def detached(sums: PairLogps) -> PairLogps:
    """The same without gradient."""
    return sums._replace(chosen=sums.chosen.detach(), rejected=sums.rejected.detach())


@torch.no_grad()
def summed_logits(hidden_states: Tensor, head: LmHead, rows: Tensor | None = None) -> Tensor:
    """Sum of the logits of all positions of ``hidden_states [B, T, D]``, or of those of some rows
    ``[B]`` bool, over the whole vocabulary.

    Scored or not, every position counts, as with Liger. The sum over the vocabulary is taken on the
    weight, so no logits are needed.
    """
    dtype = torch.promote_types(torch.float32, hidden_states.dtype)
    positions = hidden_states.sum(dim=1, dtype=dtype)
    count = torch.full_like(positions[:, 0], hidden_states.shape[1])
    if rows is not None:
        positions, count = positions.where(rows[:, None], 0.0), count.where(rows, 0.0)
    # No product of vectors: autocast would round its factors.
    total = (positions.sum(dim=0) * head.weight.sum(dim=0, dtype=dtype)).sum()
    if head.bias is not None:
        total = total + count.sum() * head.bias.sum(dtype=dtype)
    return total


def mean_logit(hidden_states: Tensor, head: LmHead) -> Tensor:
    """Mean of :func:`summed_logits`."""
    entries = hidden_states.shape[0] * hidden_states.shape[1] * head.width
    return summed_logits(hidden_states, head) / entries
