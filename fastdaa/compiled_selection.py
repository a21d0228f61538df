"""``select_pairs`` as a custom operator, for models under ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.compiled_sizes import HOST_READS, size_from_data
from fastdaa.outputs import TokenSelection
from fastdaa.selection import select_pairs


@torch.library.custom_op("fastdaa::select_pairs", mutates_args=(), tags=HOST_READS)
def _select(labels: Tensor, order: str, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[N]``, targets ``[N]`` and lengths ``[2B]`` of :func:`fastdaa.select_pairs`."""
    return select_pairs(labels, order=order, ignore_index=ignore_index)[:3]


@_select.register_fake
def _(labels: Tensor, order: str, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = size_from_data()
    return (
        labels.new_empty(tokens), labels.new_empty(tokens), labels.new_empty(labels.shape[0]),
    )  # fmt: skip


def compiled_select_pairs(
    labels: Tensor, order: str, ignore_index: int, device: torch.device
) -> TokenSelection:
    """:func:`fastdaa.select_pairs` as one node of a graph; its counts are not known to the host.

    The tensors of the selection are on ``device``.
    """
    rows, targets, lengths = (t.to(device) for t in _select(labels, order, ignore_index))
    return TokenSelection(rows, targets, lengths, ())
