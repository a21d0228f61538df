"""Cutting a tokenised row to a number of tokens, as TRL 1.16 does."""

from __future__ import annotations

from typing import Literal, NamedTuple

from fastdaa.data.encode import Ids, Tokenized

TruncationMode = Literal["keep_start", "keep_end"]
PROMPT_TOO_LONG = "prompts of max_length tokens or more"
NO_COMPLETION = "completions without a token of their own"


class Cut(NamedTuple):
    """A :class:`~fastdaa.data.encode.Tokenized` within ``max_length``, as columns of a dataset."""

    ids: tuple[Ids, ...]
    """The prompt, and the completions."""
    skips: tuple[int, ...]
    """Leading prompt tokens that each completion does not see."""
    truncated: int
    """Sequences that lost a token."""


def cut(row: Tokenized, max_length: int | None, mode: TruncationMode) -> Cut | str:
    """The row with sequences of at most ``max_length`` tokens, or the reason to drop it."""
    prompt, completions, _ = row
    if max_length is not None and mode == "keep_start" and len(prompt) >= max_length:
        return PROMPT_TOO_LONG
    if not all(completions):
        return NO_COMPLETION
    none = (0,) * len(completions)
    if max_length is None:
        return Cut((prompt, *completions), none, 0)
    over = [max(0, len(prompt) + len(side) - max_length) for side in completions]
    truncated = sum(map(bool, over))
    if mode == "keep_start":
        room = max_length - len(prompt)
        return Cut((prompt, *(side[:room] for side in completions)), none, truncated)
    unseen = [min(len(prompt), tokens) for tokens in over]
    shared = min(unseen)
    kept = [
        side[tokens - gone :] for side, tokens, gone in zip(completions, over, unseen, strict=True)
    ]
    return Cut((prompt[shared:], *kept), tuple(gone - shared for gone in unseen), truncated)
