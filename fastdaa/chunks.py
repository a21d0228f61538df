"""Batches cut into chunks of whole pairs, whose losses are known as soon as their logits are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastdaa.outputs import TokenStats


class Chunk(NamedTuple):
    """Whole pairs whose logits, or their gradients, are held together."""

    pairs: slice
    tokens: slice


ChunkObjective = Callable[[Tensor, Chunk, TokenStats | None], tuple[Tensor, Tensor]]
"""Token log-probs ``[n]`` of a chunk, and their statistics where a call takes them, to the losses
``[b]`` of its pairs and the derivatives ``[n]`` of the batch's mean loss by the log-probs."""


def chunks_of_pairs(counts: tuple[int, ...], budget: int) -> list[Chunk]:
    """Consecutive pairs in chunks of at most ``budget`` tokens; a longer pair is one by itself.

    Args:
        counts: scored tokens of every sequence, pair-major, ``2B`` host integers.
    """
    chunks: list[Chunk] = []
    first_pair, first_token, end = 0, 0, 0
    for pair in range(len(counts) // 2):
        size = counts[2 * pair] + counts[2 * pair + 1]
        if pair > first_pair and end + size - first_token > budget:
            chunks.append(Chunk(slice(first_pair, pair), slice(first_token, end)))
            first_pair, first_token = pair, end
        end += size
    if len(counts):
        chunks.append(Chunk(slice(first_pair, len(counts) // 2), slice(first_token, end)))
    return chunks
