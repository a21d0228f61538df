"""Tiles of logits: products with fp32 results, and the factors of the products that follow.

What happens to a tile between two products is the business of :mod:`fastdaa.engines`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from copy import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastdaa.engines import (
    ENGINES,
    RowTile,
    TritonTile,
    logits_memory,
    merged_statistics,
)
from fastdaa.head import LmHead
from fastdaa.outputs import TokenStats
from fastdaa.row_passes import FP16_TARGET, RowState, finish_logits, steepest_slope
from fastdaa.slices import (
    CPU_ROW_MULTIPLE,
    PRODUCT_BYTES,
    ROW_MULTIPLE,
    UNSPLIT_ENTRIES,
    adds_halves,
    logit_blocks,
)

_HALVES = (torch.float16, torch.bfloat16)
_SMALLEST_COEFFICIENT = 2.0**-100
# A slice of a product is a multiple of 128 rows.
_SLICE_ROWS = 128


def blocks(total: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` (the last one shorter) that cover ``range(total)``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off: operand dtypes are chosen here, and results stay wide."""
    return torch.autocast(device.type, enabled=False)


def operand_dtype(hidden_states: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the factors of every product.

    On CPU half precision is widened to fp32 (there is no product with a wider result). Elsewhere
    they follow autocast if it is on, all but fp64; if not, the wider of the two serves both.
    """
    wide = torch.promote_types(hidden_states.dtype, weight.dtype)
    if hidden_states.device.type == "cpu":
        return torch.promote_types(wide, torch.float32)
    if torch.is_autocast_enabled(hidden_states.device.type) and wide != torch.float64:
        return torch.get_autocast_dtype(hidden_states.device.type)
    return wide


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b``, with an fp32 result for half-precision factors."""
    if a.dtype in _HALVES:
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def logits_product(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``hidden @ weight.T``, wide, the same bits for a row whichever rows come with it.

    Policy and reference may meet a row in blocks of different heights. CPU products round
    differently in the rows that are left over below a multiple of a few, so there zero rows fill up
    the last block. ``out`` has :func:`filled_rows` of them.
    """
    if hidden.device.type != "cpu":
        return product(hidden, weight.T, _aligned(hidden, weight) if out is None else out)
    rows = hidden.shape[0]
    missing = filled_rows(rows, hidden.device) - rows
    filled = F.pad(hidden, (0, 0, 0, missing)) if missing else hidden
    return product(filled, weight.T, out)[:rows]


def filled_rows(rows: int, device: torch.device) -> int:
    """Rows of a product that gives the statistics of so many rows."""
    return -(-rows // CPU_ROW_MULTIPLE) * CPU_ROW_MULTIPLE if device.type == "cpu" else rows


def _aligned(hidden: Tensor, weight: Tensor) -> Tensor | None:
    """Memory for the logits of an odd vocabulary on a GPU; None where a product's own will do."""
    (rows, _), width = hidden.shape, weight.shape[0]
    if width % ROW_MULTIPLE == 0 or hidden.device.type == "cpu":
        return None
    dtype = torch.float32 if hidden.dtype in _HALVES else hidden.dtype
    return logits_memory(rows, width, hidden.device, dtype)


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``, rounded once to the dtype of ``out``."""
    wide = torch.float32 if a.dtype in _HALVES else a.dtype
    if out.dtype == wide:
        product(a, b, out)
    elif out.dtype == a.dtype and out.numel() >= UNSPLIT_ENTRIES:
        torch.mm(a, b, out=out)
    else:
        for rows in product_slices(out):
            out[rows] = product(a[rows], b)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``, rounded once to the dtype of ``out``."""
    wide = torch.float32 if a.dtype in _HALVES else a.dtype
    if out.dtype == wide:
        accumulate(out, a, b)
    elif out.dtype == a.dtype and out.numel() >= UNSPLIT_ENTRIES:
        out.addmm_(a, b)
    else:
        for rows in product_slices(out):
            out[rows] += product(a[rows], b)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the dtype of ``total``."""
    if a.dtype in _HALVES:
        add_half_product(total, a, b)
    else:
        total.addmm_(a, b)


def add_half_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, fp32, of half-precision factors; there is such a product on GPUs only.

    A product of its own and an addition move 16 bytes an entry instead of 8; before torch 2.10
    there is no other way.
    """
    if adds_halves():
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return
    for rows in product_slices(total):
        total[rows] += product(a[rows], b)


def product_slices(result: Tensor) -> Iterator[slice]:
    """Slices of the rows of a product's result that is not the end of it: a GPU's cache holds one,
    and its product fills the GPU."""
    return row_slices(*result.shape)


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """The same for a result of these sizes."""
    most = PRODUCT_BYTES // (4 * columns) // _SLICE_ROWS * _SLICE_ROWS
    return blocks(rows, max(most, _SLICE_ROWS))


def sum_over_shards(total: Tensor, head: LmHead) -> None:
    """Gradients of hidden states, whole from the parts of the vocabulary's processes, in place."""
    if head.shard is not None:
        dist.all_reduce(total, group=head.shard.group)


class Logits:
    """Tiles of the logits of ``hidden_states [N, D]`` under a head, in fp32 (or fp64).

    With ``positions [N]`` the rows are those of hidden states ``[P, D]``, copied where they are
    needed.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        head: LmHead,
        operand: torch.dtype | None = None,
        engine: str = "torch",
        positions: Tensor | None = None,
    ):
        self.head, self.positions = head, positions
        # A backward pass runs outside the autocast of its forward, so it hands over the dtype.
        self.operand = operand or operand_dtype(hidden_states, head.weight)
        self.wide = torch.float64 if self.operand == torch.float64 else torch.float32
        self.hidden_states = hidden_states
        self.engine_name, self.engine = engine, ENGINES[engine]

    def pick(self, rows: Tensor) -> Logits:
        """The logits of some rows."""
        picked = copy(self)
        picked.positions = rows if self.positions is None else self.positions[rows]
        return picked

    @property
    def tokens(self) -> int:
        """``N``"""
        return len(self.hidden_states if self.positions is None else self.positions)

    def own_rows(self, rows: slice | Tensor) -> Tensor:
        """Hidden states ``[r, D]``."""
        if self.positions is not None:
            rows = self.positions[rows]
        if isinstance(rows, slice):
            return self.hidden_states[rows]
        return self.hidden_states.index_select(0, rows)  # which takes no negative numbers

    def rows(self, rows: slice | Tensor) -> Tensor:
        """Hidden states ``[r, D]`` as a factor."""
        return self.own_rows(rows).to(self.operand)

    def columns(self, columns: slice) -> Tensor:
        """Weight rows ``[c, D]`` as a factor."""
        return self.head.weight[columns].to(self.operand)

    def tile(self, hidden: Tensor, weight: Tensor, columns: slice) -> Tensor:
        """Final logits ``[r, c]``: bias, scale, cap and temperature applied."""
        return finish_logits(self.head, logits_product(hidden, weight), columns)

    def row_tile(
        self, hidden: Tensor, weight: Tensor, columns: slice, out: Tensor | None = None,
        block_rows: int | None = None,
    ) -> RowTile:  # fmt: skip
        """Raw products ``[r, c]`` in the hands of the engine.

        ``out`` may be a wide buffer to use, with the rows that :func:`logits_product` wants.
        ``block_rows``: of each product, as other paths make them; None for all.
        """
        return self.engine(
            self.head, self._products(hidden, weight, out, block_rows), columns, self.operand
        )

    def statistics(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, stats: bool
    ) -> tuple[RowState, TokenStats | None]:
        """Statistics of rows of which no more is in memory at a time than has to be."""
        width = self.head.width
        parts = logit_blocks(self.engine_name, hidden.shape[0], width)
        if len(parts) == 1:
            return self.row_tile(hidden, weight, slice(0, width)).statistics(targets, stats)
        states = []
        for columns in parts:
            z = logits_product(hidden, weight[columns])
            tile = TritonTile(self.head, z, columns, self.operand)
            states.append(tile.states(targets, stats))
            del z, tile  # before the next ones are made
        return merged_statistics(torch.cat(states), targets, self.head)

    def _products(
        self, hidden: Tensor, weight: Tensor, out: Tensor | None, block_rows: int | None
    ) -> Tensor:
        rows, width = hidden.shape[0], weight.shape[0]
        high = min(block_rows or rows, rows)
        if high == rows and len(logit_blocks(self.engine_name, rows, width)) == 1:
            return logits_product(hidden, weight, out)
        if out is None:
            filled = filled_rows(rows, hidden.device)
            out = logits_memory(filled, width, hidden.device, self.wide)
        for part in blocks(rows, max(high, 1)):
            height = part.stop - part.start
            place = out[part.start : part.start + filled_rows(height, hidden.device)]
            for columns in logit_blocks(self.engine_name, height, width):
                logits_product(hidden[part], weight[columns], place[:, columns])
        return out[:rows]

    def tile_again(self, hidden: Tensor, weight: Tensor, columns: slice) -> RowTile:
        """The same where the statistics are known: other last bits do not matter."""
        z = product(hidden, weight.T, _aligned(hidden, weight))
        return self.engine(self.head, z, columns, self.operand)


def fp16_scale(largest: Tensor) -> Tensor:
    """The power of two that brings entries up to ``largest`` into the range of fp16."""
    # All may be 0; the scale has to stay finite then.
    largest = largest.clamp(min=_SMALLEST_COEFFICIENT)
    return torch.exp2(torch.floor(torch.log2(FP16_TARGET / largest)))


class GradientFactor:
    """Keeps gradient tiles inside the range of the products' dtype, and undoes it.

    fp16 has too few exponents for a coefficient times a small probability: coefficients are scaled
    by a power of two, taken from the largest of them and the steepest slope of a logit, and the
    results are scaled back.
    """

    def __init__(self, logits: Logits, coefficients: Tensor):
        self.operand = logits.operand
        self.scale: Tensor | None = None
        if self.operand == torch.float16 and coefficients.numel():
            self.scale = fp16_scale(coefficients.abs().amax() * steepest_slope(logits.head))

    def scaled(self, coefficients: Tensor) -> Tensor:
        """The coefficients that gradient tiles are made with."""
        return coefficients if self.scale is None else coefficients * self.scale

    def restore(self, result: Tensor) -> Tensor:
        """A product with a tile of scaled coefficients, or its sum, in true size (in place)."""
        return result if self.scale is None else result.div_(self.scale)

    def write(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """``out = a @ b`` where one factor is a tile of scaled coefficients, rounded once."""
        if self.scale is None:
            write_product(out, a, b)
            return
        for rows in product_slices(out):
            out[rows] = self.restore(product(a[rows], b))

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """``total += a @ b`` where one factor is a tile of scaled coefficients."""
        if self.scale is None:
            accumulate(total, a, b)
            return
        for rows in product_slices(total):
            total[rows].add_(self.restore(product(a[rows], b)))
