"""Attention over the segments of a packed row, without a dense mask.

A packed row ``[1, L]`` is a list of ``G`` segments. The queries of a segment are a contiguous
slice of the row. Its keys are either the same slice, or a shared prompt followed by that slice:
a causal mask aligned to the bottom right, as flash-attn has it since 2.1. Nothing of size
``[L, L]`` is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdaa.train import cpu_attention
from fastdaa.train.cpu_attention import Span
from fastdaa.train.segment_backends import choose_backend, varlen_runner


def segment_spans(q_lens: Sequence[int], k_lens: Sequence[int]) -> list[Span]:
    """Where the queries and the prefix keys of every segment lie in the row.

    A segment with as many keys as queries attends to itself. One with more keys continues a shared
    prompt: the first ``k_len - q_len`` positions of the closest self-contained segment before it.

    Raises:
        ValueError: the lengths cannot have come from a packed or prefix-shared row.
    """
    spans: list[Span] = []
    position = base = base_length = 0
    for index, (queries, keys) in enumerate(zip(q_lens, k_lens, strict=True)):
        if queries == keys:
            base, base_length = position, queries
        prefix = keys - queries
        if not 0 <= prefix <= base_length:
            raise ValueError(
                f"expected segment {index} to have between {queries} and {queries + base_length} "
                f"keys (its own and a prefix of the segment before it), got {keys}"
            )
        spans.append(Span(base, base + prefix, position, position + queries))
        position += queries
    return spans


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Mapping[str, Any],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of every segment of a packed row over its own keys.

    Args:
        query: ``[1, H, L, d]``.
        key: ``[1, Hkv, L, d]``; ``Hkv`` divides ``H``.
        value: ``[1, Hkv, L, dv]``.
        segments: ``cu_q``, ``cu_k`` int32 ``[G + 1]``, ``kv_index`` int64 ``[K]``, and the host
            lists ``q_lens``, ``k_lens``; optionally ``backend``, one of ``BACKENDS``.
        scale: factor of the scores; ``None`` for ``d ** -0.5``.
        window: a query sees the last ``window`` keys, itself included; ``None`` for all.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask.
        dropout: probability of dropping an attention weight; 0 outside training.

    Returns:
        ``[1, L, H, dv]``, contiguous. Rows after the last segment are zero.

    Raises:
        ValueError: shapes and segments disagree, or the requested backend cannot serve the call.
    """
    q_lens, k_lens = segments["q_lens"], segments["k_lens"]
    _check_row(query, key, value, q_lens)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        narrow = torch.get_autocast_dtype(device_type)
        query, key, value = (t.to(narrow) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and window >= max(k_lens, default=0):
        window = None
    choice = choose_backend(
        device_type,
        query.dtype,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        softcap=softcap,
        dropout=dropout,
        requested=segments.get("backend", "auto"),
    )
    if choice.name == "cpu_blocks":
        spans = segment_spans(q_lens, k_lens)
        return cpu_attention.blocked_attention(query, key, value, spans, scale=scale, window=window)
    if choice.name in ("flash_attn", "torch_varlen"):
        out = _varlen(choice.name, query, key, value, segments, scale, window, softcap, dropout)
    else:
        attend = _sdpa_segment if choice.name == "sdpa_loop" else _eager_segment
        pieces = [
            attend(q, k, v, scale, window, softcap, dropout).transpose(1, 2)
            for q, k, v in _segment_tensors(query, key, value, q_lens, k_lens)
        ]
        out = torch.cat(pieces, dim=1)
    missing = query.shape[2] - out.shape[1]
    return F.pad(out, (0, 0, 0, 0, 0, missing)) if missing else out


def _check_row(query: Tensor, key: Tensor, value: Tensor, q_lens: Sequence[int]) -> None:
    rows, length = query.shape[0], query.shape[2]
    if rows != 1 or key.shape[2] != length or value.shape[2] != length:
        raise ValueError(
            "expected one packed row whose queries and keys have the same length (no key-value "
            f"cache), got queries {tuple(query.shape)} and keys {tuple(key.shape)}"
        )
    if sum(q_lens) > length:
        raise ValueError(f"expected segments within a row of {length}, got {sum(q_lens)} queries")


def _segment_tensors(
    query: Tensor, key: Tensor, value: Tensor, q_lens: Sequence[int], k_lens: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of every non-empty segment, key heads repeated to match."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    spare = query.shape[2] - sum(q_lens)
    # One split instead of a slice a segment: its backward writes each gradient once.
    q, k, v = (t.split([*q_lens, spare], dim=2) for t in (query, key, value))
    base = 0
    for index, (queries, keys) in enumerate(zip(q_lens, k_lens, strict=True)):
        base = index if queries == keys else base
        if queries == 0:
            continue
        if queries == keys:
            yield q[index], k[index], v[index]
            continue
        prefix = keys - queries
        both = (torch.cat((t[base][:, :, :prefix], t[index]), dim=2) for t in (k, v))
        yield (q[index], *both)


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    ages = torch.arange(keys - queries, keys, device=device)[:, None]
    ages = ages - torch.arange(keys, device=device)[None]
    seen = ages >= 0
    return seen if window is None else seen & (ages < window)


def _sdpa_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    square = q.shape[2] == k.shape[2] and window is None
    mask = None if square else _visible(q.shape[2], k.shape[2], window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=square, scale=scale
    )


def _eager_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_visible(q.shape[2], k.shape[2], window, q.device), float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype), dropout)
    return torch.matmul(weights, v)


def _varlen(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Mapping[str, Any],
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """One variable-length kernel call over ``[tokens, heads, d]``; returns ``[1, L, H, d]``."""
    q_lens, k_lens = segments["q_lens"], segments["k_lens"]
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if list(q_lens) == list(k_lens):
        k, v = k[: sum(q_lens)], v[: sum(q_lens)]
    else:
        k, v = (t.index_select(0, segments["kv_index"]) for t in (k, v))
    out = varlen_runner(name)(
        q[: sum(q_lens)],
        k,
        v,
        cu_q=segments["cu_q"],
        cu_k=segments["cu_k"],
        max_q=max(q_lens),
        max_k=max(k_lens),
        scale=scale,
        window=window,
        softcap=softcap,
        dropout=dropout,
    )
    return out.unsqueeze(0)
