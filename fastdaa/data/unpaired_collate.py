"""From tokenised rows with labels to a batch of packs, with mismatched completions beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastdaa.data.collate import SequenceCollator, SequenceLayout
from fastdaa.data.fields import (
    LABEL_FIELD,
    MISMATCHED_FIELD,
    REF_MISMATCHED_FIELD,
    REF_SEQUENCE_FIELD,
)
from fastdaa.data.truncation import TruncationMode


class UnpairedCollator(SequenceCollator):
    """Collates prompts with labelled completions; a ``collate_fn`` for a ``DataLoader``.

    A row has what :class:`~fastdaa.data.collate.SequenceCollator` reads, ``label`` (bool), and
    optionally ``ref_logps`` (float). Its packs have more entries: ``labels``, bool ``[S]``,
    ``desirable``, the same as a list, and ``ref_logps``, fp32 ``[S]``, if the rows have it.

    With ``mismatched``, a batch has ``kl_packs`` and ``mismatched`` beside ``packs``: the prompt of
    row ``i`` with the completion of row ``i - 1``, of the first row with that of the last (KTO's
    sample of what the policy says to other prompts, arXiv 2402.01306, in the order of TRL 1.16),
    and how many of them there are: a batch of one row has none, and holds its own completion there.
    Where rows have ``mismatched_ids``, these are the completion instead, whatever the batch is, and
    ``ref_mismatched_logps`` the ``ref_logps`` of ``kl_packs``.

    Args:
        layout, pad_token_id, tokens_per_pack: as of
            :class:`~fastdaa.data.collate.SequenceCollator`.
        mismatched: whether the loss reads mismatched completions.
        max_length: they are cut to that many tokens with their prompts; None for no limit.
        truncation_mode: which end of them is kept.

    Raises:
        ValueError: as of :class:`~fastdaa.data.collate.SequenceCollator`.
    """

    def __init__(
        self,
        layout: SequenceLayout = "packed",
        pad_token_id: int | None = None,
        tokens_per_pack: int | None = None,
        *,
        mismatched: bool = False,
        max_length: int | None = None,
        truncation_mode: TruncationMode = "keep_start",
    ) -> None:
        super().__init__(layout, pad_token_id, tokens_per_pack)
        self.mismatched, self.max_length = mismatched, max_length
        self.truncation_mode = truncation_mode

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of ``rows``."""
        batch = super().__call__(rows)
        if self.mismatched:
            fixed = MISMATCHED_FIELD in rows[0]
            others = [row["completion_ids"] for row in (rows[-1], *rows[:-1])]
            if fixed:
                others = [row[MISMATCHED_FIELD] for row in rows]
            crossed = [self.cross(row, other) for row, other in zip(rows, others, strict=True)]
            batch["kl_packs"] = self._packs(crossed)
            batch["mismatched"] = len(rows) if fixed or len(rows) > 1 else 0
        return batch

    def cross(self, row: Mapping[str, Any], completion: Any) -> dict[str, Any]:
        """A row with another completion ``[n]``, both within ``max_length``."""
        prompt = row["prompt_ids"]
        over = len(prompt) + len(completion) - (self.max_length or len(prompt) + len(completion))
        if over > 0 and self.truncation_mode == "keep_start":
            completion = completion[: len(completion) - over]
        elif over > 0:
            # A completion fits by itself: it was cut with its own prompt.
            prompt = prompt[over:]
        crossed = {**row, "prompt_ids": prompt, "completion_ids": completion}
        if REF_MISMATCHED_FIELD in row:
            crossed[REF_SEQUENCE_FIELD] = row[REF_MISMATCHED_FIELD]
        return crossed

    def _packs(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        packs = super()._packs(rows)
        for pack in packs:
            pack["desirable"] = [bool(rows[index][LABEL_FIELD]) for index in pack["members"]]
            pack["labels"] = torch.tensor(pack["desirable"])
            if REF_SEQUENCE_FIELD in rows[0]:
                numbers = [rows[index][REF_SEQUENCE_FIELD] for index in pack["members"]]
                pack["ref_logps"] = torch.tensor(numbers, dtype=torch.float32)
        return packs
