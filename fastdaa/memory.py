"""What a call on the head holds beyond its inputs and the gradients that it returns, in bytes.

Three kinds of memory: sums whose size is given (a gradient in fp32 until it is rounded), gradients
of logits that are kept, and a tile of logits, the only one that can be made smaller. A tile costs
more than its logits where an engine holds something beside them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_HALVES = (torch.float16, torch.bfloat16)
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
# enough for thousands of rows, so that a slice of the weight's gradient is summed in few products;
# and the most bytes that such a slice may take.
_CPU_COLUMNS = 4096
_DEVICE_COLUMNS = 16384
_SUM_BYTES = 256 << 20
_COLUMN_MULTIPLE = 256
# Tensors of the size of a tile that the comparison of two tiles holds, the two among them.
_DIVERGENCE_TILES = 7
# Products are rounded in slices of so many bytes of fp32, which a GPU's cache holds and whose
# products fill it twice over.
PRODUCT_BYTES = 32 << 20


class CallSize(NamedTuple):
    """Sizes and dtypes of one call."""

    width: int
    """Rows of the weight."""
    hidden_size: int = 0
    """``D``; 0 where it is not known, and nothing but tiles is counted."""
    tokens: int = 0
    """``N`` scored tokens; 0 where it is not known."""
    operand: torch.dtype = torch.float32
    """Dtype of the factors of the products."""
    weight_dtype: torch.dtype | None = None
    """None for ``operand``."""
    hidden_dtype: torch.dtype | None = None
    """None for ``operand``."""
    softcap: bool = False
    """The head has one."""
    stats: bool = False
    """Token statistics are wanted."""
    sparse: bool = False
    """Tokens with a coefficient of 0 are left out of products: the others' rows are copied."""

    @property
    def wide(self) -> int:
        """Bytes of a logit."""
        return 8 if self.operand == torch.float64 else 4

    @property
    def narrow(self) -> int:
        """Bytes of a factor."""
        return self.operand.itemsize

    @property
    def half(self) -> bool:
        """Products have half-precision factors."""
        return self.operand in _HALVES

    @property
    def hidden_sum(self) -> int:
        """Bytes of a wide ``[N, D]``."""
        return self.wide * self.tokens * self.hidden_size

    @property
    def weight_sum(self) -> int:
        """Bytes of a wide ``[V, D]``."""
        return self.wide * self.width * self.hidden_size

    @property
    def slice_entry(self) -> int:
        """Bytes of an entry of a slice of the weight's gradient that is summed before it is
        rounded, and of the slice of the weight as a factor where that is a copy."""
        own = self.weight_dtype or self.operand
        total = 0 if own.itemsize == self.wide else self.wide
        return total + (0 if own == self.operand else self.narrow)

    @property
    def row_copy(self) -> int:
        """Bytes of a row of hidden states as a factor, where its own dtype is another."""
        own = self.hidden_dtype or self.operand
        return 0 if own == self.operand else self.narrow * self.hidden_size

    @property
    def picked_row(self) -> int:
        """Bytes of a copy of a row of hidden states, where some of them are left out."""
        own = self.hidden_dtype or self.operand
        return own.itemsize * self.hidden_size if self.sparse else 0

    @property
    def weight_copy(self) -> int:
        """Bytes of the weight as a factor, where its own dtype is another."""
        own = self.weight_dtype or self.operand
        return 0 if own == self.operand else self.narrow * self.width * self.hidden_size


def statistics_entry(size: CallSize, engine: str, *, slope: bool = False) -> int:
    """Bytes of a logit while statistics are taken; ``slope``: a gradient follows."""
    if engine != "torch":
        return size.wide
    return size.wide * (1 + size.stats + (slope and size.softcap))


def gradient_entry(size: CallSize, engine: str) -> int:
    """Bytes of a logit while its gradient is made and handed to a product."""
    if engine != "torch":
        return size.wide
    return size.wide * (1 + size.softcap) + (size.narrow if size.half else 0)


class Tiles(NamedTuple):
    """What a path holds at a time."""

    block_rows: int
    """Tokens whose statistics are taken at once, from whole rows of logits."""
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
    return size.hidden_sum + size.weight_sum + size.weight_copy


def plan_tiles(
    path: str, size: CallSize, engine: str, *, on_cpu: bool, max_bytes: int | None,
    whole: bool = False, wanted: tuple[bool, bool] = (True, True),
) -> Tiles:  # fmt: skip
    """Tiles within ``max_bytes``, or the device's default where it is None.

    Sums that a path cannot do without count first; tiles get the rest, but a quarter of
    ``max_bytes`` at least, so that no batch is too long.

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
    if path == "divergence":
        return room.divergence(*wanted)
    if path == "recompute":
        return room.recompute()
    if path == "single_pass":
        return room.kept(whole) if whole or room.keeps_chunks else room.chunks()
    tiles = room.frozen() if path == "frozen" else room.score()
    return tiles._replace(extra_bytes=0) if path == "reference" else tiles


class _Room:
    """The budget of one call, and each path's way to spend it."""

    def __init__(self, size: CallSize, engine: str, on_cpu: bool, max_bytes: int | None):
        self.size, self.engine, self.on_cpu, self.max_bytes = size, engine, on_cpu, max_bytes
        # Half-precision products with wide results exist on GPUs only.
        self.keeps_chunks = size.operand == torch.bfloat16
        self.tile, self.chunk = _CPU_BYTES if on_cpu else _DEVICE_BYTES

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
        return min(default, max(self.max_bytes - sums, self.max_bytes // 4))

    def rows(self, budget: int, row: int) -> int:
        """Whole rows of ``row`` bytes within a budget, on a GPU as many as fill its products."""
        rows = max(budget // max(row, 1), 1)
        multiple = 1 if self.on_cpu else _DEVICE_ROW_MULTIPLE
        return rows // multiple * multiple or rows

    def block(self, budget: int, row: int) -> int:
        """Rows whose statistics are taken at once.

        The same on all paths of one head, engine and ``max_bytes`` unless memory is scarce: a GPU's
        library may choose another kernel for another number of rows, and so other last bits.
        """
        rows = self.rows(budget, row)
        if self.on_cpu:
            return min(rows, _CPU_BLOCK_ROWS)
        size, common = self.size, self.tile
        if self.max_bytes is not None:
            common = min(common, self.max_bytes // 2)
        entry = size.wide * (2 + size.softcap if self.engine == "torch" else 1)
        return min(rows, self.rows(common, entry * size.width))

    def held(self, rows: int, row: int) -> int:
        """Bytes of that many rows, or of all tokens if they are fewer."""
        return row * (min(rows, self.size.tokens) if self.size.tokens else rows)

    def score(self) -> Tiles:
        """Statistics of whole rows."""
        size = self.size
        row = statistics_entry(size, self.engine) * size.width + size.row_copy
        default = self.tile if self.on_cpu else 2 * self.tile  # the common number decides
        rows = self.block(self.beside(size.weight_copy, default), row)
        held = self.held(rows, row)
        if self.engine == "fused":
            held = size.row_copy * size.tokens  # no tiles: all rows go through one kernel
        return Tiles(rows, rows, size.width, 0, False, size.weight_copy + held)

    def frozen(self) -> Tiles:
        """Whole rows go on to their product with the weight."""
        size = self.size
        sums = size.hidden_sum + size.weight_copy
        row = self.gradient_row + size.wide * size.hidden_size
        default = self.tile if self.on_cpu else 2 * self.tile  # the common number decides
        rows = self.block(self.beside(sums, default), row)
        return Tiles(rows, rows, size.width, 0, False, sums + self.held(rows, row))

    @property
    def gradient_row(self) -> int:
        """Bytes of a row of logits whose statistics and gradient are taken one after the other."""
        statistics = statistics_entry(self.size, self.engine, slope=True)
        entry = max(statistics, gradient_entry(self.size, self.engine))
        return self.size.row_copy + self.size.width * entry

    def recompute(self) -> Tiles:
        """Statistics of whole rows, then slices of the vocabulary for as many tokens as fit."""
        size, first = self.size, self.score()
        own = size.hidden_dtype or size.operand
        returned = own.itemsize == size.wide and not size.sparse
        hidden = size.picked_row * size.tokens + (0 if returned else size.hidden_sum)
        budget = self.beside(hidden + self.product, self.tile + _SUM_BYTES)
        entry = size.slice_entry * size.hidden_size
        columns = min(size.width, _CPU_COLUMNS if self.on_cpu else _DEVICE_COLUMNS)
        most = min(_SUM_BYTES, budget // 2) // max(entry, 1)
        if entry and columns > most:
            columns = most // _COLUMN_MULTIPLE * _COLUMN_MULTIPLE or max(most, 1)
        row = gradient_entry(size, self.engine) * columns + size.row_copy
        rows = self.rows(min(budget - entry * columns, self.tile), row)
        backward = hidden + entry * columns + self.held(rows, row) + self.product
        return Tiles(first.block_rows, rows, columns, 0, False, max(backward, first.extra_bytes))

    def divergence(self, hidden_grad: bool, head_grad: bool) -> Tiles:
        """Whole rows of two heads' logits, and gradients that are summed over all rows."""
        size = self.size
        sums = 2 * size.weight_copy + size.hidden_sum * hidden_grad + size.weight_sum * head_grad
        entry = size.wide * (_DIVERGENCE_TILES + (size.softcap and hidden_grad))
        row = size.width * entry + 2 * size.row_copy + size.wide * size.hidden_size * hidden_grad
        rows = self.block(self.beside(sums, self.chunk), row)
        return Tiles(rows, rows, size.width, 0, False, sums + self.held(rows, row))

    def chunks(self) -> Tiles:
        """Chunks of whole pairs whose logits are held until their loss is known."""
        size = self.size
        slices = self.product
        if size.sparse:  # rows are moved in slices as large as those of products
            logits = size.wide * size.width * size.tokens
            slices = max(slices, min(PRODUCT_BYTES, logits or PRODUCT_BYTES))
        sums = single_pass_sums(size) + slices
        budget = self.beside(sums, self.chunk)
        row = self.gradient_row + size.picked_row
        if size.sparse and self.engine != "torch":
            row += size.narrow * size.width  # beside the logits, not in their place
        rows, block = self.rows(budget, row), self.block(budget, row)
        return Tiles(block, rows, size.width, 0, False, sums + self.held(rows, row))

    def kept(self, whole: bool) -> Tiles:
        """Half-precision gradients of logits without their coefficients: of the batch until
        backward, or of chunks of whole pairs until their loss is known."""
        size = self.size
        sums = size.weight_copy if whole else single_pass_sums(size)
        entry = 2 * size.width
        row = size.row_copy + size.width * statistics_entry(size, self.engine, slope=True)
        if whole:
            tokens = size.tokens
            budget = self.beside(sums + entry * tokens, self.tile)
        else:
            room = self.beside(sums, self.tile + _KEPT_BYTES)
            budget = min(self.tile, room // 2)
            tokens = self.rows(min(room - budget, _KEPT_BYTES), entry)
        rows = self.block(budget, row)
        # A product's result before it is rounded, and the hidden states as a factor.
        after = self.result + size.narrow * size.tokens * size.hidden_size
        if size.sparse:  # picked rows have no place of their own to be rounded in
            after += self.result // 2
        held = max(self.held(rows, row), after)
        return Tiles(rows, rows, size.width, tokens, whole, sums + self.held(tokens, entry) + held)
