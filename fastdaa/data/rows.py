"""The tokenised dataset as a ``DataLoader`` wants it: numbered rows, read without lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from fastdaa.data.fields import (
    ADVANTAGE_FIELDS,
    LABEL_FIELD,
    MISMATCHED_FIELD,
    REF_FIELDS,
    REF_MISMATCHED_FIELD,
    REF_SEQUENCE_FIELD,
    REF_TOKEN_FIELDS,
    SEQUENCE_FIELDS,
    SKIP_FIELDS,
    TOKEN_FIELDS,
)

if TYPE_CHECKING:
    from datasets import Dataset


class _Rows(TorchDataset[dict[str, Any]]):
    """Rows with their ``row_id`` and such columns as a collator reads; others are left out."""

    tokens: tuple[str, ...]
    """Columns of token ids, all required."""
    lists: tuple[str, ...] = ()
    """Further columns of lists, read where there are some."""
    scalars: tuple[str, ...] = ()
    """Columns of numbers, read where there are some."""

    def __init__(self, dataset: Dataset) -> None:
        missing = [field for field in self.tokens if field not in dataset.column_names]
        if missing:
            raise ValueError(f"dataset: expected the columns {self.tokens}, got no {missing}")
        known = dataset.column_names
        self._lists = [*self.tokens, *(field for field in self.lists if field in known)]
        self._scalars = [field for field in self.scalars if field in known]
        self._dataset = dataset.with_format("arrow", columns=[*self._lists, *self._scalars])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        table = self._dataset[[int(index) for index in indices]]
        rows: list[dict[str, Any]] = [{"row_id": int(index)} for index in indices]
        for field in self._lists:
            for row, ids in zip(rows, _arrays(table[field]), strict=True):
                row[field] = ids
        for field in self._scalars:
            for row, value in zip(rows, table[field].to_pylist(), strict=True):
                row[field] = value
        return rows

    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of every row, ``[rows]`` int64, by column; for samplers that look at lengths."""
        import pyarrow.compute

        table = self._dataset[:]
        return {
            field: pyarrow.compute.list_value_length(table[field]).to_numpy().astype(np.int64)
            for field in self.tokens
        }


class PairRows(_Rows):
    """Rows of a tokenised dataset for :class:`PairCollator`, each with its ``row_id``.

    Token ids come as 1-D int arrays straight from Arrow, which is several times faster than
    lists. A batch is read in one go where the loader supports it (``__getitems__``).

    Args:
        dataset: with ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, and optionally the skips,
            reference log-probs and advantages that :class:`PairCollator` names; other columns are
            left out.

    Raises:
        ValueError: a column of token ids is missing.
    """

    tokens = TOKEN_FIELDS
    lists = REF_TOKEN_FIELDS
    scalars = (*SKIP_FIELDS, *REF_FIELDS, *ADVANTAGE_FIELDS)


class SequenceRows(_Rows):
    """Rows of a tokenised dataset for :class:`SequenceCollator`, read as :class:`PairRows` does.

    Args:
        dataset: with ``prompt_ids`` and ``completion_ids``; other columns are left out.

    Raises:
        ValueError: one of the columns is missing.
    """

    tokens = SEQUENCE_FIELDS


class UnpairedRows(_Rows):
    """Rows of a tokenised dataset for :class:`~fastdaa.data.unpaired_collate.UnpairedCollator`.

    Args:
        dataset: with ``prompt_ids``, ``completion_ids`` and ``label``, and optionally
            ``ref_logps``, ``mismatched_ids`` and ``ref_mismatched_logps``; other columns are left
            out.

    Raises:
        ValueError: one of the columns is missing.
    """

    tokens = SEQUENCE_FIELDS
    lists = (MISMATCHED_FIELD,)
    scalars = (LABEL_FIELD, REF_SEQUENCE_FIELD, REF_MISMATCHED_FIELD)

    def __init__(self, dataset: Dataset) -> None:
        if LABEL_FIELD not in dataset.column_names:
            raise ValueError(f"dataset: expected a column {LABEL_FIELD!r}, got none")
        super().__init__(dataset)


def _arrays(column: Any) -> list[np.ndarray]:
    import pyarrow

    arrays = []
    for chunk in column.chunks:
        values = chunk.flatten()
        if pyarrow.types.is_null(values.type):
            # Of lists that are all empty.
            values = values.cast(pyarrow.int64())
        values = values.to_numpy()
        ends = np.cumsum(chunk.value_lengths().to_numpy())
        arrays += np.split(values, ends[:-1]) if len(ends) else []
    return arrays
