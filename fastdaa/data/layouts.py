"""Where every token of a pack lies, and which tokens are scored: numpy on the host, no loops.

A sequence is a prompt span and a completion span of one flattened row. The spans of a pair's two
sequences share the prompt in the layout ``prefix_shared`` and are apart in the other two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Spans(NamedTuple):
    """Spans of all sequences of a pack, each ``[S]`` int64, pair-major, in the flattened row."""

    prompt_start: Ints
    prompt_len: Ints
    completion_start: Ints
    completion_len: Ints
    query_start: Ints
    """First position that this sequence computes itself."""
    query_len: Ints
    """Positions that it computes itself: all of them, or the completion if the prompt is shared."""


def exclusive_cumsum(values: Ints) -> Ints:
    """``[0, v0, v0 + v1, ...]``, as long as ``values``."""
    return np.cumsum(values) - values


def spans_packed(prompt_len: Ints, completion_len: Ints, reuses: NDArray[np.bool_]) -> Spans:
    """Sequences back to back; one that ``reuses`` a prompt has that of the sequence before it.

    Args:
        prompt_len: ``[S]`` prompt tokens that each sequence sees.
        completion_len: ``[S]`` completion tokens.
        reuses: ``[S]`` sequences whose prompt is stored with the one before, which has its own.
    """
    own_prompt = np.where(reuses, 0, prompt_len)
    query_len = own_prompt + completion_len
    query_start = exclusive_cumsum(query_len)
    prompt_start = np.where(reuses, np.roll(query_start, 1), query_start)
    completion_start = query_start + own_prompt
    return Spans(prompt_start, prompt_len, completion_start, completion_len, query_start, query_len)


def spans_padded(prompt_len: Ints, completion_len: Ints, width: int) -> Spans:
    """One row of ``width`` positions a sequence, filled from the left."""
    start = np.arange(len(prompt_len), dtype=np.int64) * width
    query_len = prompt_len + completion_len
    return Spans(start, prompt_len, start + prompt_len, completion_len, start, query_len)


def position_ids(spans: Spans) -> Ints:
    """``[L]`` position of every token of a packed row within its sequence.

    A completion whose prompt is shared continues the positions of that prompt.
    """
    first = spans.prompt_len + spans.completion_len - spans.query_len
    shift = np.repeat(spans.query_start - first, spans.query_len)
    return np.arange(len(shift), dtype=np.int64) - shift


def key_index(spans: Spans) -> tuple[Ints, Ints]:
    """Keys of every segment: ``[K]`` positions of the row, and ``[S]`` keys of each segment.

    A segment without queries gets no keys, so that no kernel has to write gradients for them.
    """
    key_len = np.where(spans.query_len > 0, spans.prompt_len + spans.completion_len, 0)
    within = np.arange(key_len.sum(), dtype=np.int64) - np.repeat(
        exclusive_cumsum(key_len), key_len
    )
    in_prompt = within < np.repeat(spans.prompt_len, key_len)
    prompt_shift = np.repeat(spans.prompt_start, key_len)
    completion_shift = np.repeat(spans.completion_start - spans.prompt_len, key_len)
    return within + np.where(in_prompt, prompt_shift, completion_shift), key_len


def scored_tokens(spans: Spans) -> tuple[Ints, Ints, Ints]:
    """Scored tokens of all sequences, sequence by sequence.

    The first completion token is predicted at the last prompt position, every other one at the
    token before it. A completion without a prompt does not score its first token.

    Returns:
        ``[N]`` positions that predict, ``[N]`` positions of the predicted tokens, ``[S]`` scored
        tokens of each sequence.
    """
    length = spans.completion_len
    offset = exclusive_cumsum(length)
    target = np.arange(length.sum(), dtype=np.int64) + np.repeat(
        spans.completion_start - offset, length
    )
    row = target - 1
    has_tokens = length > 0
    first = offset[has_tokens]
    row[first] = (spans.prompt_start + spans.prompt_len - 1)[has_tokens]
    orphan = has_tokens & (spans.prompt_len == 0)
    if orphan.any():
        keep = np.ones(len(row), dtype=bool)
        keep[offset[orphan]] = False
        row, target = row[keep], target[keep]
    return row, target, length - orphan
