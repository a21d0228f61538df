"""From tokenised rows to a batch of packs: preference pairs, and prompts with one completion."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fastdaa.data import packs
from fastdaa.data.fields import (
    ADVANTAGE_FIELDS,
    REF_FIELDS,
    REF_TOKEN_FIELDS,
    SEQUENCE_FIELDS,
    SKIP_FIELDS,
    TOKEN_FIELDS,
)
from fastdaa.data.packing import pack_by_length, pack_by_width
from fastdaa.validation import check_choice, check_positive

Layout = Literal["prefix_shared", "packed", "padded"]
SequenceLayout = Literal["packed", "padded"]


class _Collator:
    """What collators have in common: layout, padding, and the budget of a pack."""

    layouts: tuple[str, ...]
    rows_per_item: int

    def __init__(
        self, layout: str, pad_token_id: int | None = None, tokens_per_pack: int | None = None
    ) -> None:
        check_choice("layout", layout, self.layouts)
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
        batch = self._packs(rows)
        return {"row_ids": torch.tensor([int(row["row_id"]) for row in rows]), "packs": batch}

    def _packs(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _groups(self, widths: list[int], stored: list[int]) -> list[list[int]]:
        """Items of each pack, by the longest row of an item and by the tokens that it stores."""
        if self.tokens_per_pack is None:
            return [list(range(len(widths)))]
        if self.layout == "padded":
            return pack_by_width(widths, self.tokens_per_pack, rows_per_item=self.rows_per_item)
        return pack_by_length(stored, self.tokens_per_pack)

    def _pack(
        self,
        prompts: list[np.ndarray],
        completions: list[np.ndarray],
        reuses: np.ndarray | None = None,
    ) -> dict[str, Any]:
        if self.layout == "padded":
            assert self.pad_token_id is not None
            return packs.padded(prompts, completions, self.pad_token_id)
        return packs.packed(prompts, completions, reuses)


class _Pair(NamedTuple):
    """One tokenised pair as arrays; the prompts are those that each completion sees."""

    prompts: tuple[np.ndarray, np.ndarray]
    completions: tuple[np.ndarray, np.ndarray]
    shared: bool

    @property
    def widths(self) -> tuple[int, int]:
        chosen, rejected = (len(p) + len(c) for p, c in zip(*self[:2], strict=True))
        return chosen, rejected

    @property
    def stored(self) -> int:
        """Tokens that a packed row keeps of it."""
        return sum(self.widths) - (len(self.prompts[1]) if self.shared else 0)


class PairCollator(_Collator):
    """Collates tokenised pairs into packs; a ``collate_fn`` for a ``DataLoader``.

    A row has ``row_id`` (int), ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (lists or 1-D
    arrays of ints), and optionally ``ref_chosen_logps`` and ``ref_rejected_logps`` (floats),
    ``ref_chosen_token_logps`` and ``ref_rejected_token_logps`` (floats of the scored tokens), and
    ``chosen_skip`` and ``rejected_skip``: leading prompt tokens that this completion does not see
    (``truncation_mode="keep_end"`` cuts both sequences apart). A pair with unequal skips is stored
    as two sequences in every layout.

    A batch is ``{"row_ids": int64 [B], "packs": [pack, ...]}``. Sequences of a pack are
    pair-major: ``2i`` is the chosen and ``2i + 1`` the rejected completion of the pack's pair
    ``i``. A pack with ``b`` pairs, ``S = 2b`` sequences and ``N`` scored tokens holds

    ========================  =========================================================
    ``input_ids``             int64 ``[R, L]``; ``R = S`` in ``padded``, otherwise 1
    ``position_ids``          int64 ``[R, L]``
    ``attention_mask``        int64 ``[R, L]``; only in ``padded``
    ``segments``              see :func:`dense_mask`; only in ``packed``, ``prefix_shared``
    ``rows``, ``targets``     int64 ``[N]``; see :class:`~fastdaa.outputs.TokenSelection`
    ``lengths``, ``counts``   int64 ``[S]`` and ``list[int]``: scored tokens
    ``completion_lengths``    int64 ``[S]``: completion tokens, scored or not
    ``pair_index``            int64 ``[b]``: which pairs of the batch these are
    ``ref_logps``             fp32 ``[S]``; only if the rows have reference log-probs
    ``ref_token_logps``       fp32 ``[N]``; only if the rows have those of the tokens
    ``advantages``            fp32 ``[S]``; only if the rows have ``chosen_advantage``, ...
    ``tokens``                int: tokens that the model computes, padding not counted
    ``padded_tokens``         int: this pack's share of a padded ``[chosen; rejected]`` batch
    ========================  =========================================================

    Args:
        layout: ``prefix_shared`` stores ``prompt | chosen | rejected``; ``packed`` stores
            sequences back to back; ``padded`` stores one right-padded row a sequence.
        pad_token_id: fills the rows of ``padded``; not used by the other layouts.
        tokens_per_pack: splits a batch into packs of at most this many tokens (in ``padded``,
            padding included); a pair that is longer gets its own pack. ``None``: one pack.

    Raises:
        ValueError: an unknown layout, ``padded`` without ``pad_token_id``, or a budget below 1;
            when called: no rows, a row without a required field, or reference log-probs in some
            rows only.
    """

    layouts = get_args(Layout)
    rows_per_item = 2

    def __init__(
        self,
        layout: Layout = "prefix_shared",
        pad_token_id: int | None = None,
        tokens_per_pack: int | None = None,
    ) -> None:
        super().__init__(layout, pad_token_id, tokens_per_pack)

    def _packs(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        pairs = [_read_pair(row, self.layout == "prefix_shared") for row in rows]
        ref_logps = _read_numbers(rows, REF_FIELDS)
        advantages = _read_numbers(rows, ADVANTAGE_FIELDS)
        widths = [max(pair.widths) for pair in pairs]
        batch = []
        for members in self._groups(widths, [pair.stored for pair in pairs]):
            pack = self._pack_pairs([pairs[index] for index in members])
            pack["pair_index"] = torch.tensor(members)
            pack["padded_tokens"] = 2 * len(members) * max(widths)
            if ref_logps is not None:
                pack["ref_logps"] = ref_logps[members].flatten()
            if advantages is not None:
                pack["advantages"] = advantages[members].flatten()
            if REF_TOKEN_FIELDS[0] in rows[0]:
                pack["ref_token_logps"] = _token_logps([rows[i] for i in members], pack["counts"])
            batch.append(pack)
        return batch

    def _pack_pairs(self, pairs: list[_Pair]) -> dict[str, Any]:
        prompts = [prompt for pair in pairs for prompt in pair.prompts]
        completions = [tokens for pair in pairs for tokens in pair.completions]
        reuses = np.zeros(2 * len(pairs), dtype=bool)
        reuses[1::2] = [pair.shared for pair in pairs]
        pack = self._pack(prompts, completions, reuses)
        pack["completion_lengths"] = torch.tensor([len(tokens) for tokens in completions])
        return pack


class SequenceCollator(_Collator):
    """Collates prompts with one completion each into packs; a ``collate_fn`` for a ``DataLoader``.

    A row has ``row_id`` (int), ``prompt_ids`` and ``completion_ids`` (1-D arrays or lists). A batch
    is ``{"row_ids": int64 [B], "packs": [pack, ...]}``. A pack has the entries of
    :mod:`fastdaa.data.packs`, ``padded_tokens`` as in :class:`PairCollator`, and ``members``: which
    rows of the batch these are.

    Args:
        layout: ``packed`` stores sequences back to back, ``padded`` one right-padded row each.
        pad_token_id: fills the rows of ``padded``.
        tokens_per_pack: splits a batch into packs of at most this many tokens (in ``padded``,
            padding included); a longer sequence gets its own pack. None: one pack.

    Raises:
        ValueError: an unknown layout, ``padded`` without ``pad_token_id``, a budget below 1; when
            called: no rows.
    """

    layouts = get_args(SequenceLayout)
    rows_per_item = 1

    def __init__(
        self,
        layout: SequenceLayout = "packed",
        pad_token_id: int | None = None,
        tokens_per_pack: int | None = None,
    ) -> None:
        super().__init__(layout, pad_token_id, tokens_per_pack)

    def _packs(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        prompts, completions = ([_as_array(row[f]) for row in rows] for f in SEQUENCE_FIELDS)
        sizes = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        batch = []
        for members in self._groups(sizes, sizes):
            pack = self._pack([prompts[i] for i in members], [completions[i] for i in members])
            pack["padded_tokens"] = len(members) * max(sizes)
            pack["members"] = members
            batch.append(pack)
        return batch


def _read_pair(row: Mapping[str, Any], share_prompts: bool) -> _Pair:
    missing = [field for field in ("row_id", *TOKEN_FIELDS) if field not in row]
    if missing:
        raise ValueError(
            f"row: expected the fields row_id, {', '.join(TOKEN_FIELDS)}; no {missing}"
        )
    prompt, chosen, rejected = (_as_array(row[field]) for field in TOKEN_FIELDS)
    skips = [int(row.get(field) or 0) for field in SKIP_FIELDS]
    prompts = (prompt[skips[0] :], prompt[skips[1] :])
    return _Pair(prompts, (chosen, rejected), share_prompts and skips[0] == skips[1])


def _as_array(ids: Any) -> np.ndarray:
    if isinstance(ids, list):
        # array() reads a list of ints about three times faster than numpy does.
        return np.asarray(array("q", ids))
    return np.asarray(ids, dtype=np.int64)


def _read_numbers(rows: Sequence[Mapping[str, Any]], fields: tuple[str, str]) -> Tensor | None:
    """``[B, 2]`` fp32: a number of each side of every row, or None if no row has them."""
    present = [row.get(field) is not None for row in rows for field in fields]
    if not any(present):
        return None
    if not all(present):
        raise ValueError(f"rows: expected {fields} in all rows or in none, got some only")
    return torch.tensor([[row[field] for field in fields] for row in rows], dtype=torch.float32)


def _token_logps(rows: Sequence[Mapping[str, Any]], counts: list[int]) -> Tensor:
    sides = [np.asarray(row[f], dtype=np.float32) for row in rows for f in REF_TOKEN_FIELDS]
    if [len(side) for side in sides] != counts:
        raise ValueError(
            f"{REF_TOKEN_FIELDS}: expected one log-prob for each of {counts} scored tokens, got "
            f"{[len(side) for side in sides]}"
        )
    return torch.from_numpy(np.concatenate(sides))
