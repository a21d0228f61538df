"""A vocabulary that is split over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """Which tokens the rows of a head are, where every process of a group has a slice of them.

    All processes hold the same hidden states and targets and make the same calls in the same order.
    Log-probs, losses and gradients of the hidden states come out whole on each of them, gradients
    of weight and bias are those of its slice.

    Attributes:
        start: Token id of the first row.
        vocab_size: ``V`` of all processes together.
        group: The processes; None for all.
        widest: Rows of the largest slice, for which every process plans; None where no slice is
            larger than those of an even split, ``V`` over the processes, rounded up.
    """

    start: int
    vocab_size: int
    group: ProcessGroup | None = None
    widest: int | None = None

    def check(self, rows: int) -> None:
        """Raise ``ValueError`` unless so many rows lie within the vocabulary and ``widest``."""
        if not 0 <= self.start <= self.start + rows <= self.vocab_size:
            raise ValueError(
                f"shard: expected {rows} rows from token {self.start} to lie within a vocabulary "
                f"of {self.vocab_size}"
            )
        if self.widest is not None and rows > self.widest:
            raise ValueError(f"shard: expected at most widest={self.widest} rows, got {rows}")

    def planned_width(self, rows: int) -> int:
        """The width that tiles are planned for by a process with so many rows.

        The same on every process: they reduce statistics together, tile by tile.

        Raises:
            ValueError: no slice is said to be as large as this one, or as the others must be.
        """
        if self.widest is not None:
            return self.widest
        processes = torch.distributed.get_world_size(self.group)
        even = -(-self.vocab_size // processes)
        if rows > even:
            raise ValueError(
                f"shard: expected at most {even} rows, as an even split of {self.vocab_size} over "
                f"{processes} processes has, got {rows}: tell all of them the size of the largest "
                "slice, VocabShard(widest=...)"
            )
        least = self.vocab_size - even * (processes - 1)
        if rows < least:
            # Another slice is too large, and this process would wait for ever for that one.
            raise ValueError(
                f"shard: expected at least {least} rows, as an even split of {self.vocab_size} "
                f"over {processes} processes has, got {rows}: tell all of them the size of the "
                "largest slice, VocabShard(widest=...)"
            )
        return even
