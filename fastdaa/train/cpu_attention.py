"""Segment attention on the CPU, forward and backward, without a dense mask.

PyTorch's CPU flash kernel walks over keys in blocks of 512 and multiplies whole blocks, so on the
short sequences of preference data ``is_causal=True`` saves nothing: a causal square costs as much
as a full one. Here every segment is cut into short runs of queries, each of which meets only the
keys that its last query can see. That removes almost all of the masked half. One autograd function
serves the whole row: it writes into one output and one gradient buffer, where slicing under
autograd would allocate a full-size gradient for every segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.first_order import first_order

_BLOCK = 64
_ATEN = torch.ops.aten


class Span(NamedTuple):
    """Where one segment lives in the row: its queries, and the keys that precede its own."""

    prefix_start: int
    prefix_stop: int
    start: int
    stop: int

    @property
    def prefix(self) -> int:
        """Keys in front of the segment's own positions."""
        return self.prefix_stop - self.prefix_start


class _Block(NamedTuple):
    """One run of queries (row positions) and the keys it meets (positions within the segment)."""

    start: int
    stop: int
    key_start: int
    key_stop: int


def is_available() -> bool:
    """Whether this PyTorch has the CPU flash kernel and its backward with a mask argument."""
    names = (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    )
    return all(
        hasattr(_ATEN, name) and "attn_mask" in str(getattr(_ATEN, name).default._schema)
        for name in names
    )


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Sequence[Span],
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of every segment over its prefix and itself; differentiable once.

    Args:
        query: ``[1, H, L, d]`` on the CPU, any floating dtype.
        key: ``[1, Hkv, L, d]`` of the same dtype; ``Hkv`` divides ``H``.
        value: ``[1, Hkv, L, d]``.
        spans: the segments. Rows that belong to none come out as zeros.
        scale: factor of the scores.
        window: a query sees the last ``window`` keys, itself included; ``None`` for all.

    Returns:
        ``[1, L, H, d]``, contiguous, in the dtype of ``query``.
    """
    return _BlockedAttention.apply(query, key, value, tuple(spans), scale, window)


def _blocks(span: Span, window: int | None) -> Iterator[_Block]:
    for start in range(span.start, span.stop, _BLOCK):
        stop = min(start + _BLOCK, span.stop)
        first = span.prefix + start - span.start
        key_start = 0 if window is None else max(0, first - window + 1)
        yield _Block(start, stop, key_start, span.prefix + stop - span.start)


def _block_mask(block: _Block, dtype: torch.dtype, window: int | None) -> Tensor:
    """Additive ``[queries, keys]`` mask; a view into a table, since only the distance matters."""
    queries, keys = block.stop - block.start, block.key_stop - block.key_start
    width = 1 << max(9, (keys - 1).bit_length())
    table = _mask_table(width, dtype, window)
    return table[_BLOCK - queries :, width - keys :]


@lru_cache(maxsize=16)
def _mask_table(width: int, dtype: torch.dtype, window: int | None) -> Tensor:
    with torch.inference_mode(False):
        ages = torch.arange(_BLOCK)[:, None] - _BLOCK - (torch.arange(width)[None] - width)
        hidden = ages < 0
        if window is not None:
            hidden |= ages >= window
        return torch.zeros(_BLOCK, width, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _segment_rows(rows: Tensor, span: Span) -> Tensor:
    """Keys or values of a segment, ``[Hkv, K, d]``; a view unless a prefix lies elsewhere."""
    own = rows[:, span.start : span.stop]
    if not span.prefix:
        return own
    return torch.cat((rows[:, span.prefix_start : span.prefix_stop], own), dim=1)


class _BlockedAttention(torch.autograd.Function):
    """Forward and backward over one packed row; heads are grouped as ``[Hkv, H / Hkv]``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: tuple[Span, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        _, heads, length, width = query.shape
        groups = key.shape[1]
        covered = sum(span.stop - span.start for span in spans) == length
        new = torch.empty if covered else torch.zeros
        out = new(length, heads, width, dtype=query.dtype)
        stats = torch.empty(groups, heads // groups, length, dtype=_stats_dtype(query.dtype))
        q, o = _grouped(query, groups), _grouped_output(out, groups)
        for span in spans:
            k, v = (_shared(_segment_rows(t[0], span), q) for t in (key, value))
            for block in _blocks(span, window):
                keys = slice(block.key_start, block.key_stop)
                rows = slice(block.start, block.stop)
                o[:, :, rows], stats[:, :, rows] = (
                    _ATEN._scaled_dot_product_flash_attention_for_cpu.default(
                        q[:, :, rows],
                        k[:, :, keys],
                        v[:, :, keys],
                        0.0,
                        False,
                        attn_mask=_block_mask(block, query.dtype, window),
                        scale=scale,
                    )
                )
        out = out.unsqueeze(0)
        ctx.save_for_backward(query, key, value, out, stats)
        ctx.spans, ctx.scale, ctx.window = spans, scale, window
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, stats = ctx.saved_tensors
        groups = key.shape[1]
        grads = [_zeros_by_row(t) for t in (query, key, value)]
        dq = _grouped(grads[0], groups)
        q, o = _grouped(query, groups), _grouped_output(out[0], groups)
        do = _grouped_output(grad_out[0], groups)
        for span in ctx.spans:
            k, v = (_shared(_segment_rows(t[0], span), q) for t in (key, value))
            # Without a prefix the sums are a slice of the row's own: short segments gain by that.
            segment_grads = (
                [_zeros_by_row(t[:, 0].unsqueeze(0)) for t in (k, v)]
                if span.prefix
                else [grad[:, :, span.start : span.stop] for grad in grads[1:]]
            )
            for block in _blocks(span, ctx.window):
                keys = slice(block.key_start, block.key_stop)
                rows = slice(block.start, block.stop)
                dq[:, :, rows], *found = (
                    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default(
                        do[:, :, rows],
                        q[:, :, rows],
                        k[:, :, keys],
                        v[:, :, keys],
                        o[:, :, rows],
                        stats[:, :, rows],
                        0.0,
                        False,
                        attn_mask=_block_mask(block, query.dtype, ctx.window),
                        scale=ctx.scale,
                    )
                )
                for total, part in zip(segment_grads, found, strict=True):
                    total[0, :, keys] += part.sum(1) if part.shape[1] > 1 else part[:, 0]
            for grad, part in zip(grads[1:], segment_grads, strict=True):
                if not span.prefix:
                    continue
                grad[0, :, span.prefix_start : span.prefix_stop] += part[0, :, : span.prefix]
                grad[0, :, span.start : span.stop] += part[0, :, span.prefix :]
        return grads[0], grads[1], grads[2], None, None, None


def _stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _zeros_by_row(like: Tensor) -> Tensor:
    """Zeros ``[1, H, L, d]`` whose memory runs over ``L`` first, as projections produce it."""
    batch, heads, length, width = like.shape
    return like.new_zeros(batch, length, heads, width).transpose(1, 2)


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """``[1, H, L, d]`` as ``[Hkv, H / Hkv, L, d]``."""
    return rows[0].unflatten(0, (groups, -1))


def _grouped_output(rows: Tensor, groups: int) -> Tensor:
    """``[L, H, d]`` as ``[Hkv, H / Hkv, L, d]``."""
    return rows.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _shared(rows: Tensor, query: Tensor) -> Tensor:
    """``[Hkv, K, d]`` seen by every query head of its group, without a copy."""
    return rows.unsqueeze(1).expand(-1, query.shape[1], -1, -1)
