"""What a call on the head holds beyond its inputs and the gradients that it returns, in bytes.

Three kinds of memory: sums whose size is given (a gradient in fp32 until it is rounded), gradients
of logits that are kept, and a tile of logits, the only one that can be made smaller. A tile costs
more than its logits where an engine holds something beside them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdaa.call_size import CallSize, gradient_row, statistics_entry
from fastdaa.slices import (
    CPU_ROW_MULTIPLE,
    PRODUCT_BYTES,
    STATISTICS_BYTES,
    STATISTICS_ROWS,
    least_columns,
    logit_columns,
    plan_slices,
    state_bytes,
)

# Bytes of logits held at a time: (statistics and gradient tiles, chunks of the single pass). A CPU
# tile stays in the last-level cache; the single pass holds whole pairs.
_CPU_BYTES = (32 << 20, 256 << 20)
_DEVICE_BYTES = (512 << 20, 1 << 30)
# Bytes of bf16 gradients of logits that the single pass may keep: what 8192 tokens over 128256
# entries need, and no more than the fp32 sum of the weight's gradient in their place.
_KEPT_BYTES = 2 << 30
# A CPU gains nothing from more rows in one product, and its cache does not hold them.
_CPU_BLOCK_ROWS = 256
# Rows that fill the tiles of a GPU's products.
_DEVICE_ROW_MULTIPLE = 256
# Columns of the tiles of recompute's backward pass: wide enough for an efficient product, narrow
# enough for thousands of rows.
_CPU_COLUMNS = 4096
_DEVICE_COLUMNS = 16384
# Tensors of the size of a tile that the comparison of two tiles holds, the two among them.
_DIVERGENCE_TILES = 7


class Tiles(NamedTuple):
    """What a path holds at a time."""

    block_rows: int
    """Tokens whose statistics are taken at once."""
    tile_rows: int
    """Tokens of the largest tile of logits."""
    tile_columns: int
    """Vocabulary entries of that tile."""
    kept_tokens: int
    """Tokens whose gradients of logits are kept in half precision; 0 for none."""
    kept_whole: bool
    """These are all tokens of the batch, and they are kept until the backward pass."""
    extra_bytes: int
    """The most that is held, tiles, kept gradients and sums together."""

    @property
    def chunk_tokens(self) -> int:
        """Token budget of a chunk of whole pairs in a single pass."""
        return self.kept_tokens or self.tile_rows


def fits_whole(size: CallSize, engine: str, *, on_cpu: bool, max_bytes: int | None) -> bool:
    """Whether the gradients of the logits of all tokens may be kept until backward: in bf16 alone,
    within 2 GiB or half of ``max_bytes``, and what comes with them within all of it."""
    budget = _KEPT_BYTES if max_bytes is None else max_bytes // 2
    if size.operand != torch.bfloat16 or 2 * size.width * size.tokens > budget:
        return False
    tiles = plan_tiles(
        "single_pass", size, engine, on_cpu=on_cpu, max_bytes=max_bytes, whole=True
    )  # fmt: skip
    return max_bytes is None or tiles.extra_bytes <= max_bytes


def single_pass_sums(size: CallSize) -> int:
    """Bytes of the sums and copies of a single pass in chunks: they do not shrink."""
    return size.selection + size.hidden_sum + size.weight_sum + size.weight_copy


def plan_tiles(
    path: str, size: CallSize, engine: str, *, on_cpu: bool, max_bytes: int | None,
    whole: bool = False,
) -> Tiles:  # fmt: skip
    """Tiles within ``max_bytes``, or the device's default where it is None.

    Sums that a path cannot do without count first, tiles get the rest. Where that is next to
    nothing (less than a sixteenth), tiles take a quarter of ``max_bytes`` and more than it is held:
    no batch is too long.

    Raises:
        ValueError: ``max_bytes`` is below one row of logits.
    """
    row = size.wide * size.width
    if max_bytes is not None and max_bytes < row:
        raise ValueError(
            f"max_bytes: expected at least {row} (one fp{8 * size.wide} row of {size.width} "
            f"logits), got {max_bytes}"
        )
    room = _Room(size, engine, on_cpu, max_bytes)
    if engine == "fused" and path in ("score", "divergence"):
        return room.fused(path)
    if path == "divergence":
        return room.divergence()
    if path == "recompute":
        return room.recompute()
    if path == "single_pass":
        return room.kept(whole) if whole or room.keeps_chunks else room.chunks()
    tiles = room.frozen() if path == "frozen" else room.score()
    return tiles._replace(extra_bytes=0) if path == "reference" else tiles


def least_single_pass(size: CallSize, engine: str, *, on_cpu: bool, may_keep: bool) -> int:
    """The smallest ``max_bytes`` that a single pass keeps, to a MiB or a 256th part of it.

    ``may_keep``: gradients of all logits may wait for backward, if they fit.
    """

    def serves(max_bytes: int) -> bool:
        if may_keep and fits_whole(size, engine, on_cpu=on_cpu, max_bytes=max_bytes):
            return True
        tiles = plan_tiles("single_pass", size, engine, on_cpu=on_cpu, max_bytes=max_bytes)
        return tiles.extra_bytes <= max_bytes

    low = high = size.wide * size.width
    while not serves(high):
        low, high = high, 2 * high
    while high - low > max(min(1 << 20, high >> 8), 1):
        middle = (low + high) // 2
        low, high = (low, middle) if serves(middle) else (middle, high)
    return high


class _Room:
    """The budget of one call, and each path's way to spend it."""

    def __init__(self, size: CallSize, engine: str, on_cpu: bool, max_bytes: int | None):
        self.size, self.engine, self.on_cpu, self.max_bytes = size, engine, on_cpu, max_bytes
        # Half-precision products with wide results exist on GPUs only.
        self.keeps_chunks = size.operand == torch.bfloat16
        self.tile, self.chunk = _CPU_BYTES if on_cpu else _DEVICE_BYTES

    @property
    def fill(self) -> int:
        """Bytes of a copy of a row of hidden states in a block that is filled up."""
        return self.size.narrow * self.size.hidden_size * self.on_cpu

    @property
    def result(self) -> int:
        """Bytes of a slice of a product that is rounded or scaled on its way to its place."""
        return min(PRODUCT_BYTES, max(self.size.weight_sum, self.size.hidden_sum))

    @property
    def product(self) -> int:
        """The same where products add to sums: fp16 scales them, picked rows have no place."""
        return self.result if self.size.operand == torch.float16 or self.size.sparse else 0

    def beside(self, sums: int, default: int) -> int:
        """Bytes for tiles beside ``sums``."""
        if self.max_bytes is None:
            return default
        rest = self.max_bytes - sums
        return min(default, rest if 16 * rest >= self.max_bytes else self.max_bytes // 4)

    def rows(self, budget: int, row: int) -> int:
        """Whole rows of ``row`` bytes within a budget, as many as fill the device's products."""
        rows = max(budget // max(row, 1), 1)
        multiple = CPU_ROW_MULTIPLE if self.on_cpu else _DEVICE_ROW_MULTIPLE
        return rows // multiple * multiple or rows

    def block(self, budget: int, row: int) -> int:
        """Rows whose statistics are taken at once.

        The same on all paths of one head, engine and ``max_bytes`` unless memory is scarce: a GPU's
        library may choose another kernel for another number of rows, and so other last bits. A
        CPU's does not among multiples of 16, the fewest rows of a product there.
        """
        if self.on_cpu:
            rows = budget // max(row, 1)
            if self.max_bytes is None:  # the default is no limit: the nearest multiple
                rows += CPU_ROW_MULTIPLE // 2
            whole = rows // CPU_ROW_MULTIPLE * CPU_ROW_MULTIPLE
            return max(min(whole, _CPU_BLOCK_ROWS), CPU_ROW_MULTIPLE)
        rows = self.rows(budget, row)
        size, common = self.size, self.tile
        if self.max_bytes is not None:
            common = min(common, self.max_bytes // 2)
        entry = size.wide * (2 + size.softcap if self.engine == "torch" else 1)
        rows = min(rows, self.rows(common, entry * size.width))
        return min(rows, STATISTICS_ROWS) if self.engine == "triton" else rows

    def held(self, rows: int, row: int) -> int:
        """Bytes of that many rows, or of all tokens if they are fewer."""
        return row * (min(rows, self.size.tokens) if self.size.tokens else rows)

    def block_held(self, rows: int, row: int) -> int:
        """The same of rows whose statistics are taken: on CPU the last block is filled up."""
        rows = min(rows, self.size.tokens) if self.size.tokens else rows
        filled = -(-rows // CPU_ROW_MULTIPLE) * CPU_ROW_MULTIPLE if self.on_cpu else rows
        return row * filled

    def score(self) -> Tiles:
        """Statistics of rows; of few columns at a time where the engine merges those."""
        size, entry = self.size, statistics_entry(self.size, self.engine)
        sums, copy = size.selection + size.weight_copy, size.row_copy + self.fill
        budget = self.beside(sums, self.tile)
        if self.engine != "triton" or budget < STATISTICS_BYTES:
            return self.whole_rows(sums, entry * size.width + copy)
        rows = self.block(budget, entry * min(size.width, least_columns()) + copy)
        held = min(rows, size.tokens) if size.tokens else rows
        columns = logit_columns(self.engine, held, size.width)
        sums += size.tokens * state_bytes(size.width, size.stats)
        # The last block is lower, and may take more columns.
        tile = min(STATISTICS_BYTES, held * entry * size.width)
        return Tiles(rows, rows, columns, 0, False, sums + tile + held * copy)

    def frozen(self) -> Tiles:
        """Whole rows go on to their product with the weight."""
        size = self.size
        sums = size.selection + size.slopes + size.weight_copy
        row = gradient_row(size, self.engine) + size.wide * size.hidden_size + self.fill
        if self.engine != "torch" and size.operand == torch.bfloat16:
            row += size.narrow * size.width  # slopes beside the logits, from one read of them
        return self.whole_rows(sums, row)

    def whole_rows(self, sums: int, row: int) -> Tiles:
        """Whole rows of logits beside ``sums``, in blocks as high as on other paths."""
        default = self.tile if self.on_cpu else 2 * self.tile  # the common number decides
        rows = self.block(self.beside(sums, default), row)
        return Tiles(rows, rows, self.size.width, 0, False, sums + self.block_held(rows, row))

    def fused(self, path: str) -> Tiles:
        """No tile: every row has a state for every part of the vocabulary."""
        from fastdaa.kernels import merge_splits as merging
        from fastdaa.kernels import score_configs as configs

        size = self.size
        fields = merging.STATS_FIELDS if size.stats else merging.SCORE_FIELDS
        if path == "divergence":
            fields = configs.DIVERGENCE_FIELDS
        sums = size.selection + size.weight_copy
        row = configs.state_bytes(size.width, fields) + size.row_copy
        rows = self.rows(self.beside(sums, self.tile), row)
        return Tiles(rows, rows, size.width, 0, False, sums + row * min(rows, size.tokens))

    def recompute(self) -> Tiles:
        """Statistics of whole rows, then slices of the vocabulary for as many tokens as fit."""
        size, first = self.size, self.score()
        narrowed = size.own_hidden.itemsize != size.wide
        placed = not (narrowed or size.sparse or size.selected)  # the sum is what is returned
        sums = size.selection + size.picked_row * size.tokens + size.hidden_sum * (not placed)
        # Rounding makes a gradient beside its sum; of other rows than are returned, another one.
        another = narrowed and size.hidden_grad and (size.sparse or size.selected)
        last = size.own_hidden.itemsize * size.tokens * size.hidden_size * another
        budget = self.beside(sums + self.product, self.tile)
        most = _CPU_COLUMNS if self.on_cpu else _DEVICE_COLUMNS
        slices = plan_slices(size, self.engine, budget, most, self.rows)
        held = max(sums + max(slices.held + self.product, last), first.extra_bytes)
        return Tiles(first.block_rows, slices.rows, slices.columns, 0, False, held)

    def divergence(self) -> Tiles:
        """Whole rows of two heads' logits, and gradients that are summed over all rows."""
        size = self.size
        sums = 2 * size.weight_copy + size.hidden_sum + size.weight_sum
        entry = size.wide * (_DIVERGENCE_TILES + (size.softcap and size.hidden_grad))
        row = 2 * (size.row_copy + self.fill) + size.wide * size.hidden_size * size.hidden_grad
        row += size.width * entry
        rows = self.block(self.beside(sums, self.chunk), row)
        return Tiles(rows, rows, size.width, 0, False, sums + self.block_held(rows, row))

    def chunks(self) -> Tiles:
        """Chunks of whole pairs whose logits are held until their loss is known."""
        size = self.size
        slices = self.product
        if size.sparse:  # rows are moved in slices as large as those of products
            logits = size.wide * size.width * size.tokens
            slices = max(slices, min(PRODUCT_BYTES, logits or PRODUCT_BYTES))
        sums = single_pass_sums(size) + slices
        budget = self.beside(sums, self.chunk)
        row = gradient_row(size, self.engine) + size.picked_row + self.fill
        if size.sparse and self.engine != "torch":
            row += size.narrow * size.width  # beside the logits, not in their place
        rows, block = self.rows(budget, row), self.block(budget, row)
        held = self.block_held(rows, row)
        return Tiles(block, rows, size.width, 0, False, sums + held)

    def kept(self, whole: bool) -> Tiles:
        """Half-precision gradients of logits without their coefficients: of the batch until
        backward, or of chunks of whole pairs until their loss is known."""
        size = self.size
        sums = size.selection + size.weight_copy if whole else single_pass_sums(size)
        entry = 2 * size.width
        row = size.row_copy + self.fill
        row += size.width * statistics_entry(size, self.engine, slope=True)
        if whole:
            tokens = size.tokens
            budget = self.beside(sums + entry * tokens, self.tile)
        else:
            room = self.beside(sums, self.tile + _KEPT_BYTES)
            budget = min(self.tile, room // 2)
            tokens = self.rows(min(room - budget, _KEPT_BYTES), entry)
        rows = self.block(budget, row)
        # A product's result before it is rounded, and the hidden states as a factor, which go
        # before the gradient of selected rows comes.
        factor = self.held(tokens, size.narrow * size.hidden_size)
        after = self.result + max(factor, size.selection if whole else 0)
        if size.sparse:  # picked rows have no place of their own to be rounded in
            after += self.result // 2
        held = max(self.block_held(rows, row), after)
        return Tiles(rows, rows, size.width, tokens, whole, sums + self.held(tokens, entry) + held)
