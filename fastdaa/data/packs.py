"""A pack: the sequences of one forward, back to back in one row or in one padded row each.

A pack holds ``input_ids``, ``position_ids``, ``segments`` or ``attention_mask``, ``rows``,
``targets``, ``lengths``, ``counts`` and ``tokens``, as :class:`~fastdaa.data.PairCollator` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdaa.data import layouts
from fastdaa.outputs import TokenSelection


def packed(
    prompts: Sequence[np.ndarray],
    completions: Sequence[np.ndarray],
    reuses: NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """A pack of sequences back to back.

    Args:
        prompts, completions: ``S`` arrays ``[n]`` int64 each.
        reuses: ``[S]`` sequences whose prompt is that of the one before and is stored there; None
            for none.
    """
    if reuses is None:
        reuses = np.zeros(len(prompts), dtype=bool)
    spans = layouts.spans_packed(_lengths(prompts), _lengths(completions), reuses)
    pieces = []
    for prompt, completion, reused in zip(prompts, completions, reuses, strict=True):
        pieces += [completion] if reused else [prompt, completion]
    input_ids = torch.from_numpy(np.concatenate(pieces))[None]
    return {
        "input_ids": input_ids,
        "position_ids": torch.from_numpy(layouts.position_ids(spans))[None],
        "segments": _segments(spans),
        **_scored(spans, input_ids),
    }


def padded(
    prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], pad_token_id: int
) -> dict[str, Any]:
    """A pack of rows filled from the left and as wide as the longest sequence.

    Args:
        prompts, completions: ``S`` arrays ``[n]`` int64 each.
        pad_token_id: fills the rows; masked.
    """
    prompt_len, completion_len = _lengths(prompts), _lengths(completions)
    width = int((prompt_len + completion_len).max())
    ids = np.full((len(prompts), width), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : end] = completion
        mask[row, :end] = 1
    input_ids = torch.from_numpy(ids)
    return {
        "input_ids": input_ids,
        "position_ids": torch.arange(width).expand(len(ids), width).contiguous(),
        "attention_mask": torch.from_numpy(mask),
        **_scored(layouts.spans_padded(prompt_len, completion_len, width), input_ids),
    }


def selection_from(pack: Mapping[str, Any]) -> TokenSelection:
    """The scored tokens of a pack, on whatever device its tensors are."""
    return TokenSelection(pack["rows"], pack["targets"], pack["lengths"], tuple(pack["counts"]))


def dense_mask(segments: Mapping[str, Any], length: int, window: int | None = None) -> Tensor:
    """The attention mask that the segments of a packed row stand for.

    Segment ``g`` has the queries ``cu_q[g]:cu_q[g + 1]`` of the row and the keys
    ``kv_index[cu_k[g]:cu_k[g + 1]]``, causal and aligned at the bottom right: its last query sees
    all its keys.

    Args:
        segments: ``cu_q``, ``cu_k`` int32 ``[G + 1]``; ``kv_index`` int64 ``[K]``; ``q_lens`` and
            ``k_lens``, the lengths on the host.
        length: positions of the row, ``L``.
        window: if given, a query sees at most its own and the ``window - 1`` keys before it.

    Returns:
        bool ``[1, 1, L, L]`` on the device of ``kv_index``; True where a query (third axis) may
        attend a key (fourth axis). The memory is quadratic: for tests and as a fallback.
    """
    kv_index = segments["kv_index"]
    mask = torch.zeros(length, length, dtype=torch.bool, device=kv_index.device)
    query = key = 0
    for q_len, k_len in zip(segments["q_lens"], segments["k_lens"], strict=True):
        block = torch.ones(q_len, k_len, dtype=torch.bool, device=mask.device).tril(k_len - q_len)
        if window is not None:
            block = block.triu(k_len - q_len - window + 1)
        mask[query : query + q_len, kv_index[key : key + k_len]] = block
        query, key = query + q_len, key + k_len
    return mask[None, None]


def _lengths(sequences: Sequence[np.ndarray]) -> NDArray[np.int64]:
    return np.array([len(ids) for ids in sequences], dtype=np.int64)


def _scored(spans: layouts.Spans, input_ids: Tensor) -> dict[str, Any]:
    predicting, predicted, lengths = layouts.scored_tokens(spans)
    return {
        "rows": torch.from_numpy(predicting),
        "targets": input_ids.flatten()[torch.from_numpy(predicted)],
        "lengths": torch.from_numpy(lengths),
        "counts": lengths.tolist(),
        "tokens": int(spans.query_len.sum()),
    }


def _segments(spans: layouts.Spans) -> dict[str, Any]:
    kv_index, k_lens = layouts.key_index(spans)
    return {
        "cu_q": _boundaries(spans.query_len),
        "cu_k": _boundaries(k_lens),
        "kv_index": torch.from_numpy(kv_index),
        "q_lens": spans.query_len.tolist(),
        "k_lens": k_lens.tolist(),
    }


def _boundaries(lengths: np.ndarray) -> Tensor:
    ends = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=ends[1:])
    return torch.from_numpy(ends)
