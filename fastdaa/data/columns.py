"""The columns of a tokenised dataset while they grow."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdaa.data.encode import Ids
from fastdaa.data.errors import DataError
from fastdaa.data.fields import ADVANTAGE_FIELDS, LABEL_FIELD

if TYPE_CHECKING:
    from datasets import Dataset

_TOKENS_PER_CHUNK = 2**30


class TokenColumns:
    """Rows go in one by one, a dataset in memory comes out; ids are kept as 32-bit numbers.

    Args:
        fields: columns of token ids.
        skip_fields: columns of skips; empty for none.
    """

    def __init__(self, fields: Sequence[str], skip_fields: Sequence[str] = ()) -> None:
        self.fields, self.skip_fields = fields, skip_fields
        self.tokens = [array("i") for _ in fields]
        self.lengths: list[list[int]] = [[] for _ in fields]
        self.skips = [array("i") for _ in skip_fields]
        self.advantages = [array("d") for _ in ADVANTAGE_FIELDS]
        self.labels: list[bool] = []

    def add(
        self,
        ids: Sequence[Ids],
        skips: Sequence[int],
        advantages: Sequence[float] = (),
        label: bool | None = None,
    ) -> None:
        """One more row; ``skips`` and ``advantages`` are taken where there are columns for them.

        A ``label`` is one in every row or in none.
        """
        for tokens, lengths, side in zip(self.tokens, self.lengths, ids, strict=True):
            tokens.extend(side)
            lengths.append(len(side))
        for column, skip in zip(self.skips, skips, strict=False):
            column.append(skip)
        # Nothing where a row has none; `to_dataset` sees whether all rows had them.
        for numbers, number in zip(self.advantages, advantages, strict=False):
            numbers.append(number)
        if label is not None:
            self.labels.append(label)

    def to_dataset(self) -> Dataset:
        """The dataset.

        Raises:
            DataError: advantages in some rows only.
        """
        import datasets
        import pyarrow

        table: dict[str, Any] = {}
        for field, tokens, lengths in zip(self.fields, self.tokens, self.lengths, strict=True):
            ends = np.concatenate([[0], np.cumsum(lengths)])
            table[field] = _list_chunks(ends, pyarrow.array(np.asarray(tokens)))
        for field, skips in zip(self.skip_fields, self.skips, strict=True):
            table[field] = pyarrow.array(np.asarray(skips))
        given, rows = len(self.advantages[0]), len(self.lengths[0])
        if given not in (0, rows):
            raise DataError(
                f"dataset: expected {ADVANTAGE_FIELDS} in all rows or in none, got them in {given} "
                f"of {rows}"
            )
        if given:
            for field, numbers in zip(ADVANTAGE_FIELDS, self.advantages, strict=True):
                table[field] = pyarrow.array(np.asarray(numbers))
        if self.labels:
            table[LABEL_FIELD] = pyarrow.array(self.labels)
        return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table(table)))


def _list_chunks(ends: np.ndarray, values: Any) -> Any:
    """Lists of ``values`` in chunks that 32-bit offsets can address."""
    import pyarrow

    chunks, start = [], 0
    while start < len(ends) - 1:
        most = ends[start] + _TOKENS_PER_CHUNK
        stop = max(int(np.searchsorted(ends, most, side="right")) - 1, start + 1)
        offsets = pyarrow.array((ends[start : stop + 1] - ends[start]).astype(np.int32))
        part = values.slice(int(ends[start]), int(ends[stop] - ends[start]))
        chunks.append(pyarrow.ListArray.from_arrays(offsets, part))
        start = stop
    return pyarrow.chunked_array(chunks)
