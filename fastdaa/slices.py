"""Tiles of recompute's backward pass: slices of the vocabulary for as many tokens as fit.

Every tile adds to the gradient of the hidden states, once for every slice. Where one tile holds all
tokens its product is a slice of the weight's gradient. Where it does not, a slice is a wide sum
that every tile adds to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from fastdaa.call_size import CallSize, gradient_entry

ROW_MULTIPLE = 16
"""Entries of which rows of logits are multiples on GPUs."""
COLUMN_MULTIPLE = 256
"""Columns of tiles are multiples of it, as products like them."""
# Products are rounded in slices of so many bytes of fp32, which a GPU's cache holds and whose
# products fill it twice over.
PRODUCT_BYTES = 32 << 20
# A product with so many results fills a GPU four times over, so none of their sums is split: parts
# would be added in half precision (torch's allow_bf16_reduced_precision_reduction).
UNSPLIT_ENTRIES = 1 << 24
_ADDS_HALVES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
# Rows and bytes of logits whose statistics the Triton engine takes at a time. 1024 rows of 12544
# columns are 392 tiles of 128 x 256 of their product, and three for each multiprocessor of an H200
# are 396; with fewer rows columns are more: no library has a reason to split the sums.
STATISTICS_ROWS = 1024
STATISTICS_BYTES = 49 << 20
# With fewer results, 128 tiles of 128 x 128, a product leaves multiprocessors of an H200 idle, and
# its library may share sums out to them: other bits than where more rows come with a row.
LEAST_RESULTS = 1 << 21
# CPU products give a row the same bits in any block whose height is a multiple of this.
CPU_ROW_MULTIPLE = 16


def adds_halves() -> bool:
    """Whether ``torch.addmm`` takes an fp32 summand with half-precision factors."""
    return _ADDS_HALVES


def logit_blocks(engine: str, rows: int, width: int) -> list[slice]:
    """Columns of the products that make so many rows of logits for statistics.

    All of them in plain torch. The Triton kernels merge statistics of vocabulary splits: products
    of whole splits, the same on all paths, so that a row has the same bits held whole or not. What
    is left over of the vocabulary below a split joins others where it is little.
    """
    rows = max(rows, 1)
    if engine != "triton" or 4 * rows * width <= STATISTICS_BYTES:
        return [slice(0, width)]
    split = least_columns()
    splits, most = -(-width // split), max(STATISTICS_BYTES // (4 * split * rows), 1)
    count = -(-splits // most)
    few, longer = divmod(splits, count)
    lengths = [few] * (count - longer) + [few + 1] * longer
    starts = [split * before for before in accumulate(lengths[:-1], initial=0)]
    if count > 1 and rows * (width - starts[-1]) < LEAST_RESULTS:
        del starts[-1]
    return [slice(*ends) for ends in pairwise([*starts, width])]


def logit_columns(engine: str, rows: int, width: int) -> int:
    """The most columns of such a product."""
    return max(columns.stop - columns.start for columns in logit_blocks(engine, rows, width))


def least_columns() -> int:
    """Columns of a vocabulary split."""
    from fastdaa.kernels.configs import SPLIT_V

    return SPLIT_V


def state_bytes(width: int, stats: bool) -> int:
    """Bytes of a row's statistics until they are merged: of every split, and side by side."""
    from fastdaa.kernels.merge_splits import SCORE_FIELDS, STATS_FIELDS

    fields = STATS_FIELDS if stats else SCORE_FIELDS
    return 2 * 4 * fields * -(-width // least_columns())


class Slices(NamedTuple):
    """Tiles of a backward pass."""

    rows: int
    columns: int
    held: int
    """Bytes of a tile, of the sum that it adds to, and of a result before it is rounded."""
    additions: float
    """Wide entries of gradients that are read and written again, for each of a logit and of
    ``D``."""


def plan_slices(
    size: CallSize, engine: str, budget: int, most_columns: int, rows_in: Callable[[int, int], int],
    *, packed: bool = False,
) -> Slices:  # fmt: skip
    """The tiles that move the fewest bytes of gradients.

    Args:
        budget: bytes for them.
        most_columns: columns that are enough for an efficient product.
        rows_in: how many rows of so many bytes to take for a budget, first argument.
        packed: adding to the hidden states' gradient takes three times as many bytes as adding to a
            wide sum, see :mod:`fastdaa.waiting_rows`.
    """
    columns, adding = min(size.width, most_columns), 3 if packed else 1
    found = [
        *_at_once(size, engine, budget, columns, adding),
        *_summed(size, engine, budget, columns, adding, rows_in),
    ]
    return min(found, key=lambda slices: slices.additions)


def _at_once(
    size: CallSize, engine: str, budget: int, columns: int, adding: int
) -> Iterator[Slices]:
    """Tiles with all tokens, if they are known."""
    copies = size.tokens * (size.row_copy + size.gathered_row)
    budget -= copies
    entry = gradient_entry(size, engine) * size.tokens + size.slice_copy * size.hidden_size
    if not size.tokens:
        return
    rounded = size.head_grad and size.own_weight.itemsize != size.wide

    def held(columns: int) -> int:
        """Results wait for their rounding, a slice of the product at a time, or a product that is
        large enough rounds them. The last slice of the vocabulary may be too narrow for it."""
        found = []
        for width in (columns, size.width % columns):
            entries = width * size.hidden_size
            waits = rounded and not (size.own_weight == size.operand and entries >= UNSPLIT_ENTRIES)
            found.append(entry * width + waits * min(size.wide * entries, PRODUCT_BYTES))
        return max(found)

    own = whole_columns(max(min(columns, budget // entry), 0))
    if held(own) > budget:
        result = size.wide * size.hidden_size * rounded
        most = max(budget // (entry + result), (budget - PRODUCT_BYTES) // entry)
        if most < 1:
            return
        own = whole_columns(min(columns, most))
    yield Slices(size.tokens, own, held(own) + copies, adding / own)


def _summed(
    size: CallSize, engine: str, budget: int, columns: int, adding: int,
    rows_in: Callable[[int, int], int],
) -> Iterator[Slices]:  # fmt: skip
    """Tiles with some of the tokens; fewer columns leave room for more of them."""
    entry = size.slice_entry * size.hidden_size
    while True:
        row = gradient_entry(size, engine) * columns + size.row_copy + size.gathered_row
        rest = budget - entry * columns
        rows = rows_in(max(rest, 0), row)
        if size.tokens:
            rows = min(rows, size.tokens)
        if rest >= row or columns == 1:
            yield Slices(rows, columns, entry * columns + row * rows, adding / columns + 1 / rows)
        if columns == 1:
            return
        columns = whole_columns(columns // 2)


def whole_columns(columns: int) -> int:
    """As many columns, or a few less, as products like."""
    return columns // COLUMN_MULTIPLE * COLUMN_MULTIPLE or max(columns, 1)
