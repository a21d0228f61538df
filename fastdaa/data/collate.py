"""From tokenised pairs to a batch of packs, in one of three layouts."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fastdaa.data import layouts
from fastdaa.data.packing import pack_by_length, pack_by_width
from fastdaa.outputs import TokenSelection
from fastdaa.validation import check_choice, check_positive

Layout = Literal["prefix_shared", "packed", "padded"]
TOKEN_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SKIP_FIELDS = ("chosen_skip", "rejected_skip")
REF_FIELDS = ("ref_chosen_logps", "ref_rejected_logps")
ADVANTAGE_FIELDS = ("chosen_advantage", "rejected_advantage")
REF_TOKEN_FIELDS = ("ref_chosen_token_logps", "ref_rejected_token_logps")


class _Pair(NamedTuple):
    """One tokenised pair as arrays; the prompts are those that each completion sees."""

    prompts: tuple[np.ndarray, np.ndarray]
    completions: tuple[np.ndarray, np.ndarray]
    shared: bool

    @property
    def widths(self) -> tuple[int, int]:
        chosen, rejected = (len(p) + len(c) for p, c in zip(*self[:2], strict=True))
        return chosen, rejected


class PairCollator:
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

    def __init__(
        self,
        layout: Layout = "prefix_shared",
        pad_token_id: int | None = None,
        tokens_per_pack: int | None = None,
    ) -> None:
        check_choice("layout", layout, get_args(Layout))
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
        pairs = [_read_pair(row, self.layout == "prefix_shared") for row in rows]
        ref_logps = _read_numbers(rows, REF_FIELDS)
        advantages = _read_numbers(rows, ADVANTAGE_FIELDS)
        width = max(max(pair.widths) for pair in pairs)
        packs = []
        for members in self._groups(pairs):
            pack = self._pack([pairs[index] for index in members])
            pack["pair_index"] = torch.tensor(members)
            pack["padded_tokens"] = 2 * len(members) * width
            if ref_logps is not None:
                pack["ref_logps"] = ref_logps[members].flatten()
            if advantages is not None:
                pack["advantages"] = advantages[members].flatten()
            if REF_TOKEN_FIELDS[0] in rows[0]:
                pack["ref_token_logps"] = _token_logps([rows[i] for i in members], pack["counts"])
            packs.append(pack)
        return {"row_ids": torch.tensor([int(row["row_id"]) for row in rows]), "packs": packs}

    def _groups(self, pairs: list[_Pair]) -> list[list[int]]:
        if self.tokens_per_pack is None:
            return [list(range(len(pairs)))]
        if self.layout == "padded":
            return pack_by_width([max(pair.widths) for pair in pairs], self.tokens_per_pack)
        return pack_by_length([_stored_tokens(pair) for pair in pairs], self.tokens_per_pack)

    def _pack(self, pairs: list[_Pair]) -> dict[str, Any]:
        prompt_len = np.array([len(prompt) for pair in pairs for prompt in pair.prompts])
        completion_len = np.array([len(tokens) for pair in pairs for tokens in pair.completions])
        pack: dict[str, Any] = {}
        if self.layout == "padded":
            width = int((prompt_len + completion_len).max())
            spans = layouts.spans_padded(prompt_len, completion_len, width)
            pack.update(_padded_rows(pairs, width, self.pad_token_id))
        else:
            shared = np.array([pair.shared for pair in pairs])
            spans = layouts.spans_packed(prompt_len, completion_len, shared)
            pack["input_ids"] = torch.from_numpy(np.concatenate(_pieces(pairs)))[None]
            pack["position_ids"] = torch.from_numpy(layouts.position_ids(spans))[None]
            pack["segments"] = _segments(spans)
        predicting, predicted, lengths = layouts.scored_tokens(spans)
        targets = pack["input_ids"].flatten()[torch.from_numpy(predicted)]
        pack["rows"] = torch.from_numpy(predicting)
        pack["targets"] = targets
        pack["lengths"] = torch.from_numpy(lengths)
        pack["counts"] = lengths.tolist()
        pack["completion_lengths"] = torch.from_numpy(completion_len)
        pack["tokens"] = int(spans.query_len.sum())
        return pack


def selection_from(pack: Mapping[str, Any]) -> TokenSelection:
    """The scored tokens of a pack, on whatever device its tensors are."""
    return TokenSelection(pack["rows"], pack["targets"], pack["lengths"], tuple(pack["counts"]))


def dense_mask(segments: Mapping[str, Any], length: int, window: int | None = None) -> Tensor:
    """The attention mask that the segments of a packed row stand for.

    Segment ``g`` has the queries ``cu_q[g]:cu_q[g + 1]`` of the row and the keys
    ``kv_index[cu_k[g]:cu_k[g + 1]]``, causal and aligned at the bottom right: its last query sees
    all its keys.

    Args:
        segments: ``cu_q``, ``cu_k`` int32 ``[G + 1]``; ``kv_index`` int64 ``[K]``; ``q_lens`` and
            ``k_lens``, the lengths on the host.
        length: positions of the row, ``L``.
        window: if given, a query sees at most its own and the ``window - 1`` keys before it.

    Returns:
        bool ``[1, 1, L, L]`` on the device of ``kv_index``; True where a query (third axis) may
        attend a key (fourth axis). The memory is quadratic: for tests and as a fallback.
    """
    kv_index = segments["kv_index"]
    mask = torch.zeros(length, length, dtype=torch.bool, device=kv_index.device)
    query = key = 0
    for q_len, k_len in zip(segments["q_lens"], segments["k_lens"], strict=True):
        block = torch.ones(q_len, k_len, dtype=torch.bool, device=mask.device).tril(k_len - q_len)
        if window is not None:
            block = block.triu(k_len - q_len - window + 1)
        mask[query : query + q_len, kv_index[key : key + k_len]] = block
        query, key = query + q_len, key + k_len
    return mask[None, None]


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


def _stored_tokens(pair: _Pair) -> int:
    return sum(pair.widths) - (len(pair.prompts[1]) if pair.shared else 0)


def _pieces(pairs: list[_Pair]) -> list[np.ndarray]:
    pieces = []
    for (chosen_prompt, rejected_prompt), (chosen, rejected), shared in pairs:
        pieces += [chosen_prompt, chosen]
        pieces += [rejected] if shared else [rejected_prompt, rejected]
    return pieces


def _padded_rows(pairs: list[_Pair], width: int, pad_token_id: int | None) -> dict[str, Tensor]:
    ids = np.full((2 * len(pairs), width), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, pair in enumerate(pairs):
        for side in (0, 1):
            prompt, completion = pair.prompts[side], pair.completions[side]
            end = len(prompt) + len(completion)
            row = 2 * index + side
            ids[row, : len(prompt)] = prompt
            ids[row, len(prompt) : end] = completion
            mask[row, :end] = 1
    positions = torch.arange(width).expand(len(ids), width).contiguous()
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": positions,
        "attention_mask": torch.from_numpy(mask),
    }


def _segments(spans: layouts.Spans) -> dict[str, Any]:
    kv_index, k_lens = layouts.key_index(spans)
    return {
        "cu_q": _boundaries(spans.query_len),
        "cu_k": _boundaries(k_lens),
        "kv_index": torch.from_numpy(kv_index),
        "q_lens": spans.query_len.tolist(),
        "k_lens": k_lens.tolist(),
    }


def _boundaries(lengths: np.ndarray) -> Tensor:
    ends = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=ends[1:])
    return torch.from_numpy(ends)
