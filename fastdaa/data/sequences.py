"""Single completions as a ``DataLoader`` wants them: rows, and batches of packed sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from fastdaa.data import layouts
from fastdaa.data.packing import pack_by_length, pack_by_width
from fastdaa.data.rows import _arrays
from fastdaa.data.tokenise_examples import SEQUENCE_FIELDS
from fastdaa.validation import check_choice, check_positive

if TYPE_CHECKING:
    from datasets import Dataset

SequenceLayout = Literal["packed", "padded"]


class SequenceRows(TorchDataset[dict[str, Any]]):
    """Rows of a tokenised dataset for :class:`SequenceCollator`, each with its ``row_id``.

    Args:
        dataset: with ``prompt_ids`` and ``completion_ids``; other columns are left out.

    Raises:
        ValueError: one of the columns is missing.
    """

    def __init__(self, dataset: Dataset) -> None:
        missing = [field for field in SEQUENCE_FIELDS if field not in dataset.column_names]
        if missing:
            raise ValueError(f"dataset: expected the columns {SEQUENCE_FIELDS}, got no {missing}")
        self._dataset = dataset.with_format("arrow", columns=[*SEQUENCE_FIELDS])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        table = self._dataset[[int(index) for index in indices]]
        rows: list[dict[str, Any]] = [{"row_id": int(index)} for index in indices]
        for field in SEQUENCE_FIELDS:
            for row, ids in zip(rows, _arrays(table[field]), strict=True):
                row[field] = ids
        return rows

    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of every row, ``[rows]`` int64, by column; for samplers that look at lengths."""
        import pyarrow.compute

        table = self._dataset[:]
        return {
            field: pyarrow.compute.list_value_length(table[field]).to_numpy().astype(np.int64)
            for field in SEQUENCE_FIELDS
        }


class SequenceCollator:
    """Collates prompts with one completion each into packs; a ``collate_fn`` for a ``DataLoader``.

    A row has ``row_id`` (int), ``prompt_ids`` and ``completion_ids`` (1-D arrays or lists). A batch
    is ``{"row_ids": int64 [B], "packs": [pack, ...]}``. A pack has the entries of a pack of
    :class:`~fastdaa.data.PairCollator` that do not speak of pairs: with ``S`` sequences and ``N``
    scored tokens ``input_ids`` and ``position_ids`` int64 ``[R, L]``, ``segments`` (``packed``,
    ``R = 1``) or ``attention_mask`` (``padded``, ``R = S``), ``rows`` and ``targets`` int64
    ``[N]``, ``lengths`` int64 ``[S]``, ``counts``, ``tokens`` and ``padded_tokens``.

    Args:
        layout: ``packed`` stores sequences back to back, ``padded`` one right-padded row each.
        pad_token_id: fills the rows of ``padded``.
        tokens_per_pack: splits a batch into packs of at most this many tokens (in ``padded``,
            padding included); a longer sequence gets its own pack. None: one pack.

    Raises:
        ValueError: an unknown layout, ``padded`` without ``pad_token_id``, a budget below 1; when
            called: no rows.
    """

    def __init__(
        self,
        layout: SequenceLayout = "packed",
        pad_token_id: int | None = None,
        tokens_per_pack: int | None = None,
    ) -> None:
        check_choice("layout", layout, get_args(SequenceLayout))
        check_positive("tokens_per_pack", tokens_per_pack)
        if layout == "padded" and pad_token_id is None:
            raise ValueError("pad_token_id: expected an int for layout 'padded', got None")
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.tokens_per_pack = tokens_per_pack

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of ``rows``; see the class for its format."""
        if not rows:
            raise ValueError("rows: expected at least one row, got none")
        sequences = [
            tuple(np.asarray(row[field], dtype=np.int64) for field in SEQUENCE_FIELDS)
            for row in rows
        ]
        sizes = [len(prompt) + len(completion) for prompt, completion in sequences]
        width = max(sizes)
        packs = []
        for members in self._groups(sizes):
            pack = self._pack([sequences[index] for index in members])
            pack["padded_tokens"] = len(members) * width
            packs.append(pack)
        return {"row_ids": torch.tensor([int(row["row_id"]) for row in rows]), "packs": packs}

    def _groups(self, sizes: list[int]) -> list[list[int]]:
        if self.tokens_per_pack is None:
            return [list(range(len(sizes)))]
        if self.layout == "padded":
            return pack_by_width(sizes, self.tokens_per_pack, rows_per_item=1)
        return pack_by_length(sizes, self.tokens_per_pack)

    def _pack(self, sequences: list[tuple[np.ndarray, ...]]) -> dict[str, Any]:
        prompt_len = np.array([len(prompt) for prompt, _ in sequences])
        completion_len = np.array([len(completion) for _, completion in sequences])
        query_len = prompt_len + completion_len
        pack: dict[str, Any] = {}
        if self.layout == "padded":
            width = int(query_len.max())
            spans = layouts.spans_padded(prompt_len, completion_len, width)
            pack["input_ids"] = torch.full((len(sequences), width), self.pad_token_id or 0)
            pack["attention_mask"] = torch.zeros(len(sequences), width, dtype=torch.int64)
            for row, sequence in enumerate(sequences):
                ids = torch.from_numpy(np.concatenate(sequence))
                pack["input_ids"][row, : len(ids)] = ids
                pack["attention_mask"][row, : len(ids)] = 1
            pack["position_ids"] = torch.arange(width).expand(len(sequences), width).contiguous()
        else:
            start = layouts.exclusive_cumsum(query_len)
            spans = layouts.Spans(
                start, prompt_len, start + prompt_len, completion_len, start, query_len
            )
            pieces = [piece for sequence in sequences for piece in sequence]
            pack["input_ids"] = torch.from_numpy(np.concatenate(pieces))[None]
            pack["position_ids"] = torch.from_numpy(layouts.position_ids(spans))[None]
            pack["segments"] = _segments(query_len)
        predicting, predicted, lengths = layouts.scored_tokens(spans)
        pack["rows"] = torch.from_numpy(predicting)
        pack["targets"] = pack["input_ids"].flatten()[torch.from_numpy(predicted)]
        pack["lengths"] = torch.from_numpy(lengths)
        pack["counts"] = lengths.tolist()
        pack["tokens"] = int(query_len.sum())
        return pack


def _segments(lengths: np.ndarray) -> dict[str, Any]:
    """Every sequence attends to itself."""
    ends = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=ends[1:])
    cu = torch.from_numpy(ends)
    return {
        "cu_q": cu,
        "cu_k": cu,
        "kv_index": torch.arange(int(lengths.sum())),
        "q_lens": lengths.tolist(),
        "k_lens": lengths.tolist(),
    }
