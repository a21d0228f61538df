"""The ways of a single pass, from the cheapest: which of them a call's memory lets it take.

| way | gradients of logits | cost |
|---|---|---|
| whole | of the batch, kept in bf16 until backward | 3U |
| chunks | of whole pairs at a time, added to wide sums | 3U, and the sums' traffic |
| part | of the batch's first columns, kept; backward computes the others again | 3U to 4U |

Chunks need a loss that is known inside one, the other ways bf16 factors and the whole batch at
once.
"""

from __future__ import annotations

from fastdaa.call_size import CallSize, gradient_row, packs, statistics_entry
from fastdaa.chunks import chunks_of_pairs
from fastdaa.memory import HiddenSums, Room, Tiles
from fastdaa.slices import COLUMN_MULTIPLE, PRODUCT_BYTES, ROW_MULTIPLE, plan_slices
from fastdaa.target_rows import held_by_finished_rows, held_by_target_rows

# A chunk of n tokens reads and writes the fp32 sum of the weight's gradient, 8 V D bytes; computing
# its logits again is 2 n V D FLOP. Equal at 4 FLOP a second / bytes a second: 610 tokens on an
# A100, 740 on an H200, 1180 on an H100 (half precision, by their data sheets).
_BREAK_EVEN_TOKENS = 1024
# A single pass has to save so much of recompute's 4U.
_WORTH_KEEPING = 1 / 8
# Tokens whose gradients of logits are kept by default. What they take, more tokens do not exceed:
# then gradients are kept of chunks, which gain from so many tokens at least, or of some columns.
_KEPT_TOKENS = 8192
_CHUNK_TOKENS = 2048


class SinglePassRoom:
    """The budget of a call, and the ways of its single pass.

    Args:
        may_keep: gradients of logits can wait for backward.
        in_chunks: the loss is known inside a chunk of whole pairs.
        counts: scored tokens of every sequence, pair-major; empty if not known.
    """

    def __init__(
        self, room: Room, *, may_keep: bool, in_chunks: bool, counts: tuple[int, ...] = ()
    ):
        self.room, self.size, self.in_chunks, self.counts = room, room.size, in_chunks, counts
        self.may_keep = may_keep and room.keeps_chunks and room.size.tokens > 0

    def whole(self) -> Tiles | None:
        """All gradients of logits are kept."""
        if not self.may_keep:
            return None
        limit, tiles = self.room.max_bytes, _kept_whole(self.room)
        fits = self.size.tokens <= _KEPT_TOKENS if limit is None else tiles.extra_bytes <= limit
        return tiles if fits else None

    def chunks(self) -> Tiles:
        """Whole pairs at a time."""
        return (_kept_chunks if self.room.keeps_chunks else _held_chunks)(self.room)

    def part(self) -> Tiles | None:
        """As many of the gradients as there is memory for, if it is enough for any."""
        if not self.may_keep:
            return None
        limit = self.room.max_bytes
        ways = [_kept_part(self.room, hidden) for hidden in self.room.hidden_ways()]
        fit = [t for t in ways if t.kept_columns and (limit is None or t.extra_bytes <= limit)]
        # A wide sum takes less time, about a sixteenth of U.
        worth = self.size.width // 16
        return max(fit, key=lambda t: t.kept_columns - worth * t.packs_sum, default=None)

    def best(self) -> tuple[Tiles | None, str]:
        """The way worth taking, and the reason; None and the obstacle if ``recompute`` is
        better."""
        ways = self._ways()
        if ways:
            cost, tiles, reason = min(ways, key=lambda way: way[0])
            if cost <= 4 - _WORTH_KEEPING:
                return tiles, f"the head is trained and {reason}"
        return None, self._obstacle()

    def any(self) -> Tiles | None:
        """The cheapest way."""
        ways = self._ways()
        return min(ways, key=lambda way: way[0])[1] if ways else None

    def _ways(self) -> list[tuple[float, Tiles, str]]:
        """Those that keep ``max_bytes``, each with its cost in U."""
        found: list[tuple[float, Tiles, str]] = []
        whole, part = self.whole(), self.part()
        if whole:
            found.append((3, whole, "the gradients of the batch's logits fit in memory"))
        chunks, limit = self.chunks() if self.in_chunks else None, self.room.max_bytes
        if chunks and (limit is None or chunks.extra_bytes <= limit):
            reason = "the loss is known within a chunk of pairs"
            found.append((3 + self._chunks_cost(chunks), chunks, reason))
        if part:
            cost = 4 - part.kept_columns / self.size.width
            found.append((cost, part, "gradients of a part of the logits fit in memory"))
        return found

    def _chunks_cost(self, chunks: Tiles) -> float:
        """What chunks cost beyond 3U: the traffic of the weight's sum, and the logits of pairs that
        are longer than a chunk, which are computed twice. Nothing is known of CPUs and fp32."""
        chunk, tokens = chunks.chunk_tokens, self.size.tokens
        if self.room.on_cpu or not self.size.half or 0 < tokens <= chunk:
            return 0
        return _BREAK_EVEN_TOKENS / chunk + self.computed_twice(chunks) / max(tokens, 1)

    def computed_twice(self, tiles: Tiles) -> int:
        """Tokens of pairs that are longer than a chunk, as far as lengths are known."""
        if tiles.kept_whole:
            return 0
        chunk = tiles.chunk_tokens
        sizes = [c.tokens.stop - c.tokens.start for c in chunks_of_pairs(self.counts, chunk)]
        return sum(size for size in sizes if size > chunk)

    def _obstacle(self) -> str:
        """Why there is no good way."""
        if not self.in_chunks:
            return "the loss couples the pairs of the batch"
        chunks, limit = self.chunks(), self.room.max_bytes
        if limit is not None and chunks.extra_bytes > limit:
            return (
                f"a single pass takes {chunks.extra_bytes >> 20} MiB, "
                f"{single_pass_sums(self.size) >> 20} MiB of them for sums, more than max_bytes = "
                f"{limit >> 20} MiB"
            )
        if self._chunks_cost(chunks) > _BREAK_EVEN_TOKENS / chunks.chunk_tokens:
            return (
                f"chunks of {chunks.chunk_tokens} tokens would compute the logits of longer pairs "
                "twice"
            )
        return (
            f"chunks of {chunks.chunk_tokens} tokens would spend more on the sum of the weight's "
            "gradient than computing the logits again does"
        )


def single_pass_sums(size: CallSize) -> int:
    """Bytes of the sums and copies of a single pass in chunks: they do not shrink."""
    return size.selection + size.waiting_hidden + size.weight_sum + size.weight_copy


def _chunks_end(room: Room) -> int:
    """Bytes of the sums in the end, when that of the weight is made ready to wait."""
    size = room.size
    return size.waiting_hidden + size.weight_sum + size.waiting_weight * packs(size.own_weight)


def _most_kept(size: CallSize) -> int:
    """Bytes of gradients of logits that are kept at most where there is no budget."""
    return 2 * size.width * _KEPT_TOKENS


def _default_limit(room: Room) -> int:
    """Bytes of the backward pass of as many tokens as are kept whole."""
    size = room.size._replace(tokens=_KEPT_TOKENS)
    return _kept_backward(Room(size, room.engine, room.on_cpu, None))


def least_single_pass(
    size: CallSize, engine: str, *, on_cpu: bool, may_keep: bool, in_chunks: bool
) -> int:
    """The smallest ``max_bytes`` that a single pass keeps, to a MiB or a 256th part of it."""

    def serves(max_bytes: int) -> bool:
        room = Room(size, engine, on_cpu, max_bytes)
        return SinglePassRoom(room, may_keep=may_keep, in_chunks=in_chunks).any() is not None

    low = high = size.wide * size.width
    while not serves(high):
        low, high = high, 2 * high
    while high - low > max(min(1 << 20, high >> 8), 1):
        middle = (low + high) // 2
        low, high = (low, middle) if serves(middle) else (middle, high)
    return high


def _held_chunks(room: Room) -> Tiles:
    """Chunks of whole pairs whose logits are held until their loss is known."""
    size = room.size
    slices = room.product
    if size.sparse:  # rows are moved in slices as large as those of products
        logits = size.wide * size.width * size.tokens
        slices = max(slices, min(PRODUCT_BYTES, logits or PRODUCT_BYTES))
    if packs(size.own_hidden):
        slices = max(slices, min(PRODUCT_BYTES, size.hidden_sum))
    sums = single_pass_sums(size) + slices
    budget = room.beside(sums, room.chunk)
    row = gradient_row(size, room.engine) + size.picked_row + size.gathered_row + room.fill
    if size.sparse and room.engine != "torch":
        row += size.narrow * size.width  # beside the logits, not in their place
    rows, block = room.rows(budget, row), room.block(budget, row)
    held = max(sums + room.block_held(rows, row), _chunks_end(room))
    return Tiles(block, rows, size.width, held)


def _row(room: Room) -> int:
    """Bytes of a row of logits while what is kept of its gradient is made."""
    size = room.size
    entry = statistics_entry(size, room.engine, slope=True)
    return size.row_copy + room.fill + size.width * entry


def _common_rows(room: Room) -> int:
    """Rows whose statistics are taken at once, as many as other paths take."""
    most = room.tile if room.max_bytes is None else min(room.tile, room.max_bytes // 2)
    return room.block(most, _row(room))


def _kept_chunks(room: Room) -> Tiles:
    """Chunks of whole pairs whose gradients of logits are kept until their loss is known."""
    size, entry = room.size, 2 * room.size.width
    sums, most_kept = single_pass_sums(size), _most_kept(size)
    most = room.beside(sums, room.tile + most_kept)
    budget = min(room.tile, most // 2)
    row = _row(room) + size.gathered_row
    rows = room.block(budget, row)
    if room.max_bytes is None:
        # What is returned does not exist yet while chunks add to its sums.
        beyond = sums - size.waiting_hidden - size.own_weight.itemsize * size.weight_entries
        rest = _default_limit(room) - beyond - room.block_held(rows, row)
        most_kept = min(most_kept, max(rest, entry * _CHUNK_TOKENS))
    tokens = room.rows(min(most - budget, most_kept), entry)
    after = _after(room, tokens, 0) + room.held(tokens, size.gathered_row)
    held = sums + room.held(tokens, entry) + max(room.block_held(rows, row), after)
    held = max(held, _chunks_end(room))
    return Tiles(rows, rows, size.width, held, tokens, size.width)


def _kept_whole(room: Room) -> Tiles:
    """Gradients of all logits are kept until backward."""
    size, rows = room.size, _common_rows(room)
    forward = _kept_sums(size) + room.block_held(rows, _row(room))
    held = max(forward, _kept_backward(room))
    return Tiles(rows, rows, size.width, held, size.tokens, size.width, True)


def _kept_sums(size: CallSize) -> int:
    """Bytes of all kept gradients, and copies."""
    return size.kept_selection + size.weight_copy + 2 * size.width * size.tokens


def _kept_backward(room: Room) -> int:
    """Bytes of the backward pass with all gradients of logits."""
    return _kept_sums(room.size) + _after(room, room.size.tokens, room.size.kept_selection)


def _after(room: Room, tokens: int, last: int) -> int:
    """Bytes of the products with what is kept: a result before it is rounded, and the hidden states
    as a factor, which go before the gradient of selected rows comes (``last``)."""
    size = room.size
    factor = room.held(tokens, size.narrow * size.hidden_size)
    picked = room.result // 2 if size.sparse else 0  # no place of their own to be rounded in
    joining = factor + held_by_target_rows(tokens, size.hidden_size, size.wide, room.engine)
    finish = held_by_finished_rows(tokens, size.hidden_size, size.wide, size.narrow, room.engine)
    return max(room.result + max(factor, last) + picked + finish, joining)


def _kept_part(room: Room, hidden: HiddenSums) -> Tiles:
    """Gradients of the first columns are kept, those of the others made in backward."""
    size, most, tile = room.size, _most_kept(room.size), room.tile
    numbers = 16 * size.wide * size.tokens  # one of each kind a token
    sums = size.kept_selection + size.picked_row * size.tokens + size.weight_copy + numbers
    packed, total, last, part, _ = hidden
    joining = hidden.end + room.joining
    first = _first_product(room)  # before there is a gradient of the hidden states
    rows = _common_rows(room)
    # Forward makes whole rows, backward slices beside the gradient of the hidden states.
    forward = room.block_held(rows, _row(room))
    limit, least = room.max_bytes, forward
    if limit is None:  # of the backward pass: forward has nothing yet that is returned
        limit, least, tile = _default_limit(room), 0, tile // 2
    free = max(limit - sums - total - part - room.product, 0)
    tile = min(tile, free // 2)
    beside = max(least, first, total + max(last, part, room.result), joining)
    most = min(most, free - tile, limit - sums - beside)
    tile = min(room.tile, free - max(most, 0))
    columns = min(max(most, 0) // (2 * size.tokens), size.width - 1)
    columns = columns // COLUMN_MULTIPLE * COLUMN_MULTIPLE or columns // ROW_MULTIPLE * ROW_MULTIPLE
    others = size._replace(width=size.width - columns)
    slices = plan_slices(others, room.engine, tile, room.most_columns, room.rows, packed=packed)
    backward = total + max(slices.held + part + room.product, last, room.result)
    held = sums + 2 * size.tokens * columns
    held += max(room.block_held(rows, _row(room)), first, backward, joining)
    return Tiles(
        rows, slices.rows, slices.columns, held, size.tokens, columns, True, packs_sum=packed
    )


def _first_product(room: Room) -> int:
    """Bytes of the product of what is kept with the hidden states, and of what joins it."""
    size = room.size
    factor = size.narrow * size.tokens * size.hidden_size
    joining = held_by_target_rows(size.tokens, size.hidden_size, size.wide, room.engine)
    return factor + max(room.result, joining)
