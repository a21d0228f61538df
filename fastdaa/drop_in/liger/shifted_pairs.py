"""Liger's batches: ``[all chosen; all rejected]``, targets shifted by the caller."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.head import LmHead
from fastdaa.logps import head_logps, head_logps_and_stats, pair_logps, sequence_logps
from fastdaa.outputs import PairLogps, TokenSelection
from fastdaa.selection import pairs_in_order
from fastdaa.validation import check_head_inputs, check_indices, check_readable


def select_shifted_pairs(target: Tensor, ignore_index: int) -> TokenSelection:
    """Select the scored tokens of ``target [2B, T]`` int64, pair by pair.

    Unlike :func:`fastdaa.select_pairs`, position ``t`` of a row is predicted by the hidden state at
    position ``t``, and ``ignore_index`` may be any number. Costs one host synchronisation on a
    device.

    Raises:
        TypeError, ValueError: a target that is not int64 of two dimensions, or an odd number of
            rows.
    """
    check_indices("target", target, tuple(getattr(target, "shape", ())))
    check_readable("target", target)
    if target.ndim != 2 or target.shape[0] % 2 or not target.shape[0]:
        raise ValueError(
            f"target: expected shape [2B, T], all chosen and then all rejected, got "
            f"{list(target.shape)}"
        )
    return pairs_in_order(target, "chosen_first", ignore_index, shift=0)


def selected_sums(hidden_states: Tensor, head: LmHead, selection: TokenSelection) -> PairLogps:
    """Summed log-probs of the pairs of ``hidden_states [2B, T, D]``; differentiable.

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
    return pair_logps(sequence_logps(logps, selection.lengths), selection.lengths)


def detached(sums: PairLogps) -> PairLogps:
    """The same without gradient."""
    return sums._replace(chosen=sums.chosen.detach(), rejected=sums.rejected.detach())


@torch.no_grad()
def mean_logit(hidden_states: Tensor, head: LmHead) -> Tensor:
    """Mean logit over all positions of ``hidden_states [B, T, D]`` and the whole vocabulary.

    Scored or not, every position counts, as with Liger. The sum over the vocabulary is taken on the
    weight, so no logits are needed.
    """
    dtype = torch.promote_types(torch.float32, hidden_states.dtype)
    mean = hidden_states.mean(dim=(0, 1), dtype=dtype)
    # No product of vectors: autocast would round its factors.
    total = (mean * head.weight.sum(dim=0, dtype=dtype)).sum()
    if head.bias is not None:
        total = total + head.bias.sum(dtype=dtype)
    return total / head.width
