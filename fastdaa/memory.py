"""What a call on the head holds beyond its inputs and the gradients that it returns, in bytes.

Three kinds of memory: sums whose size is given (a gradient in fp32 until it is rounded), gradients
of logits that are kept, and a tile of logits, the only one that can be made smaller. A tile costs
more than its logits where an engine holds something beside them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdaa.call_size import (
    CallSize,
    gradient_entry,
    packs,
    slopes_row,
    statistics_entry,
    takes_targets_apart,
)
from fastdaa.slices import (
    CPU_ROW_MULTIPLE,
    PRODUCT_BYTES,
    STATISTICS_BYTES,
    STATISTICS_ROWS,
    Slices,
    adds_halves,
    least_columns,
    logit_columns,
    plan_slices,
    state_bytes,
    whole_columns,
)
from fastdaa.target_rows import held_by_finished_rows, held_by_target_rows

# Bytes of logits held at a time: (statistics and gradient tiles, chunks of the single pass). A CPU
# tile stays in the last-level cache; the single pass holds whole pairs.
_CPU_BYTES = (32 << 20, 256 << 20)
_DEVICE_BYTES = (512 << 20, 1 << 30)
# Bytes that a wide sum of the hidden states' gradient takes beyond what is returned; what is more
# comes from the default tile.
_WIDE_SUM_BYTES = 64 << 20
# A CPU gains nothing from more rows in one product, and its cache does not hold them.
_CPU_BLOCK_ROWS = 256
# Rows with which a product of the whole vocabulary is no longer bound by reading the weight.
_DEVICE_ROWS = 2048
# Rows of the tiles of a GPU's products, and of two of them.
_TILE_ROWS = 128
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
    extra_bytes: int
    """The most that is held, tiles, kept gradients and sums together."""
    kept_tokens: int = 0
    """Tokens whose gradients of logits are kept in half precision; 0 for none."""
    kept_columns: int = 0
    """Vocabulary entries of these gradients."""
    kept_whole: bool = False
    """These are all tokens of the batch, and they are kept until the backward pass."""
    hidden_rows: int = 0
    """Tokens whose gradient of the hidden states is made at once, apart from the weight's; 0 where
    both are made of the same tiles."""
    hidden_columns: int = 0
    """Vocabulary entries of the tiles that it is made of."""
    packs_sum: bool = False
    """The sum of the hidden states' gradient is in the memory of what is returned."""

    @property
    def chunk_tokens(self) -> int:
        """Token budget of a chunk of whole pairs in a single pass."""
        return self.kept_tokens or self.tile_rows


class HiddenSums(NamedTuple):
    """What a gradient of the hidden states, which slices of the vocabulary add to, takes."""

    packed: bool
    """It is summed in the memory of what is returned."""
    total: int
    """Bytes of the sum, unless it is what is returned."""
    last: int
    """Bytes of a gradient beside it in the end."""
    part: int
    """Bytes of rows of a packed sum that are wide while a product is added."""
    beyond: int = 0
    """Bytes that a wide sum takes from the default tile."""

    @property
    def end(self) -> int:
        """Bytes of a gradient of other rows than are returned, when the sum is gone."""
        return self.total if self.packed else self.last


class Room:
    """The budget of one call, and each path's way to spend it; those of the single pass are in
    :mod:`fastdaa.single_pass_memory`.

    Sums that a path cannot do without count first, tiles get the rest. Where that is next to
    nothing (less than a sixteenth), tiles take a quarter of ``max_bytes`` and more than it is held:
    no batch is too long.

    Raises:
        ValueError: ``max_bytes`` is below one row of logits.
    """

    def __init__(self, size: CallSize, engine: str, on_cpu: bool, max_bytes: int | None):
        row = size.wide * size.width
        if max_bytes is not None and max_bytes < row:
            raise ValueError(
                f"max_bytes: expected at least {row} (one fp{8 * size.wide} row of {size.width} "
                f"logits), got {max_bytes}"
            )
        self.size, self.engine, self.on_cpu, self.max_bytes = size, engine, on_cpu, max_bytes
        # Half-precision products with wide results exist on GPUs only.
        self.keeps_chunks = size.operand == torch.bfloat16
        self.tile, self.chunk = _CPU_BYTES if on_cpu else _DEVICE_BYTES
        self.most_columns = _CPU_COLUMNS if on_cpu else _DEVICE_COLUMNS

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
        """The same where products add to sums: fp16 scales them, picked rows have no place, and
        old versions of torch do not add products of half-precision factors."""
        apart = self.size.operand == torch.float16 or self.size.sparse
        return self.result if apart or (self.size.half and not adds_halves()) else 0

    def leaves_room(self, sums: int) -> bool:
        """Beside ``sums`` there is enough for tiles, a sixteenth of the budget."""
        return self.max_bytes is None or 16 * (self.max_bytes - sums) >= self.max_bytes

    def beside(self, sums: int, default: int) -> int:
        """Bytes for tiles beside ``sums``."""
        if self.max_bytes is None:
            return default
        fits = self.leaves_room(sums)
        return min(default, self.max_bytes - sums if fits else self.max_bytes // 4)

    def rows(self, budget: int, row: int) -> int:
        """Whole rows of ``row`` bytes within a budget, as many as fill the device's products."""
        rows = max(budget // max(row, 1), 1)
        multiple = CPU_ROW_MULTIPLE if self.on_cpu else _DEVICE_ROW_MULTIPLE
        if not self.on_cpu and _TILE_ROWS <= rows < _TILE_ROWS * 3 // 2:
            return _TILE_ROWS  # the rest of a second tile would be empty
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

    def tiles(self, path: str) -> Tiles:
        """Tiles within ``max_bytes``, or the device's default where it is None."""
        if self.engine == "fused" and path in ("score", "divergence"):
            return self.fused(path)
        ways = {"divergence": self.divergence, "recompute": self.recompute, "frozen": self.frozen}
        tiles = ways.get(path, self.score)()
        return tiles._replace(extra_bytes=0) if path == "reference" else tiles

    def score(self) -> Tiles:
        """Statistics of rows; of few columns at a time where the engine merges those."""
        size, entry = self.size, statistics_entry(self.size, self.engine)
        sums = size.selection + size.weight_copy
        copy = size.row_copy + size.gathered_row + self.fill
        budget = self.beside(sums, self.tile)
        if self.engine != "triton" or budget < STATISTICS_BYTES:
            return self.whole_rows(sums, entry * size.width + copy)
        rows = self.block(budget, entry * min(size.width, least_columns()) + copy)
        held = min(rows, size.tokens) if size.tokens else rows
        columns = logit_columns(self.engine, held, size.width)
        # The last block is lower, and may take more columns.
        lower = size.tokens % held
        last = lower * logit_columns(self.engine, lower, size.width)
        tile = entry * max(held * columns, last)
        if tile > budget:
            return self.whole_rows(sums, entry * size.width + copy)
        sums += size.tokens * state_bytes(size.width, size.stats)
        return Tiles(rows, rows, columns, sums + tile + held * copy)

    @property
    def frozen_sums(self) -> int:
        """What a frozen head holds beside tiles: slopes, and copies."""
        return self.size.selection + self.size.waiting_hidden + self.size.weight_copy

    def frozen(self) -> Tiles:
        """Whole rows go on to their product with the weight."""
        size, sums = self.size, self.frozen_sums
        row = slopes_row(size, self.engine) + size.gathered_row + self.fill
        if self.engine != "torch" and size.operand == torch.bfloat16:
            row += size.narrow * size.width  # slopes beside the logits, from one read of them
        if packs(size.own_hidden):  # their product is wide at first
            product = size.narrow * size.width + size.wide * size.hidden_size
            row = max(row, size.row_copy + size.gathered_row + self.fill + product)
        return self.whole_rows(sums, row)

    def whole_rows(self, sums: int, row: int) -> Tiles:
        """Whole rows of logits beside ``sums``, in blocks as high as on other paths."""
        default = self.tile if self.on_cpu else 2 * self.tile  # the common number decides
        rows = self.block(self.beside(sums, default), row)
        return Tiles(rows, rows, self.size.width, sums + self.block_held(rows, row))

    def fused(self, path: str) -> Tiles:
        """No tile: every row has a state for every part of the vocabulary."""
        from fastdaa.kernels import merge_splits as merging
        from fastdaa.kernels import score_configs as configs

        size = self.size
        fields = merging.STATS_FIELDS if size.stats else merging.SCORE_FIELDS
        if path == "divergence":
            fields = configs.DIVERGENCE_FIELDS
        sums = size.selection + size.weight_copy
        row = configs.state_bytes(size.width, fields) + size.row_copy + size.gathered_row
        rows = self.rows(self.beside(sums, self.tile), row)
        return Tiles(rows, rows, size.width, sums + row * min(rows, size.tokens))

    def recompute(self) -> Tiles:
        """Statistics of whole rows, then slices of the vocabulary for as many tokens as fit."""
        size, first = self.size, self.score()
        copies = size.selection
        adds = size.hidden_grad and size.tokens > 0
        if adds and not size.head_grad:
            return self.by_rows(first, copies)
        ways = []
        for hidden in self.hidden_ways():
            numbers = 2 * size.wide * size.tokens * self.apart  # what rounding takes from targets
            sums = copies + hidden.total + hidden.part + numbers
            narrowed = size.own_hidden.itemsize != size.wide
            if not (adds and narrowed) or self.leaves_room(sums + max(self.product, hidden.last)):
                tile = self.tile - hidden.beyond
                ways += [(hidden, sums, self.slices(sums, tile, hidden.packed))] if tile > 0 else []
        if not ways:
            return self.two_sweeps(first, copies)
        hidden, sums, slices = min(ways, key=lambda way: way[2].additions)
        held = max(sums + max(slices.held + self.product, hidden.last), first.extra_bytes)
        held = max(held, copies + hidden.end + self.joining)
        return Tiles(first.block_rows, slices.rows, slices.columns, held, packs_sum=hidden.packed)

    @property
    def apart(self) -> bool:
        """``recompute`` adds what rounding takes from the targets' entries."""
        size = self.size
        own = {size.own_weight, size.own_hidden}
        return takes_targets_apart(size.operand, own) and (size.bonus or not size.entropy)

    @property
    def joining(self) -> int:
        """Bytes of the rows of targets that join the weight's gradient of ``recompute``."""
        size = self.size
        if not (self.apart and size.head_grad):
            return 0
        return held_by_target_rows(size.tokens, size.hidden_size, size.wide, self.engine)

    @property
    def moved(self) -> int:
        """Bytes of a gradient of other rows of hidden states than are returned."""
        return self.size.own_rows if self.size.sparse or self.size.selected else 0

    def slices(self, sums: int, tile: int, packed: bool = False) -> Slices:
        """Tiles of the backward pass beside ``sums``, of so many bytes by default."""
        budget = self.beside(sums + self.product, tile)
        call = (self.size, self.engine, budget, self.most_columns, self.rows)
        return plan_slices(*call, packed=packed)

    def two_sweeps(self, first: Tiles, copies: int) -> Tiles:
        """The weight's gradient, then that of the hidden states: no wide sum of all rows."""
        rows, slices = self.by_rows(first, copies), self.slices(copies, self.tile)
        joining = self.moved + self.joining
        held = max(copies + max(slices.held + self.product, joining), rows.extra_bytes)
        return rows._replace(tile_rows=slices.rows, tile_columns=slices.columns, extra_bytes=held)

    def by_rows(self, first: Tiles, copies: int) -> Tiles:
        """The gradient of the hidden states alone, a block of rows at a time."""
        size = self.size
        copies += self.moved
        budget = self.beside(copies + self.product, self.tile)
        # A block's wide sum takes a quarter at most; more rows than fill a product gain nothing.
        row = size.wide * size.hidden_size + size.row_copy + size.gathered_row
        rows = min(self.rows(budget // 4, row), _CPU_BLOCK_ROWS if self.on_cpu else _DEVICE_ROWS)
        entry, copy = gradient_entry(size, self.engine), size.slice_copy * size.hidden_size
        columns = (budget - self.held(rows, row)) // (self.held(rows, entry) + copy)
        columns = min(max(columns, 1), size.width)
        columns = columns if columns == size.width else whole_columns(columns)
        tile = self.held(rows, row + entry * columns) + copy * columns
        held = max(copies + self.product + tile, first.extra_bytes)
        return Tiles(
            first.block_rows, rows, columns, held, hidden_rows=rows, hidden_columns=columns
        )

    def hidden_ways(self) -> list[HiddenSums]:
        """Sums of the hidden states' gradient."""
        size = self.size
        moved = size.sparse or size.selected  # of other rows than are returned
        narrowed = size.own_hidden.itemsize != size.wide
        # Rounding makes a gradient beside its sum; of other rows than are returned, another one.
        last, finish = size.own_rows * size.hidden_grad, 0
        if self.apart:
            finish = held_by_finished_rows(
                size.tokens, size.hidden_size, size.wide, size.narrow, self.engine
            )
        total = size.hidden_sum * (narrowed or moved)
        wide = HiddenSums(False, total, last * (narrowed and moved) + finish, 0)
        if not packs(size.own_hidden) or not size.hidden_grad:
            return [wide]
        beyond = max(size.hidden_sum - last - _WIDE_SUM_BYTES, 0)
        part = min(PRODUCT_BYTES, size.hidden_sum)
        both = last * (size.sparse and size.selected)
        return [wide._replace(beyond=beyond), HiddenSums(True, last * moved, both, part)]

    def divergence(self) -> Tiles:
        """Whole rows of two heads' logits, and gradients that are summed over all rows."""
        size = self.size
        sums = 2 * size.weight_copy + size.waiting_hidden + size.weight_sum
        entry = size.wide * (_DIVERGENCE_TILES + (size.softcap and size.hidden_grad))
        row = 2 * (size.row_copy + self.fill) + size.wide * size.hidden_size * size.hidden_grad
        row += size.width * entry
        rows = self.block(self.beside(sums, self.chunk), row)
        return Tiles(rows, rows, size.width, sums + self.block_held(rows, row))
