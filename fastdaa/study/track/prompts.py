"""The prompts that a policy answers: distinct, held out, tokenised as the training data are."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from fastdaa.counted import counted
from fastdaa.data.encode import encode
from fastdaa.data.errors import BadRow
from fastdaa.data.fields import TOKEN_FIELDS
from fastdaa.data.pairs import checked_pairs
from fastdaa.data.reports import SkipReport
from fastdaa.data.sources import rows_of
from fastdaa.study.track.settings import TrackSettings
from fastdaa.train.backbone import causal_lm

logger = logging.getLogger(__name__)
_READ_AT_ONCE = 64
_CLOSING_TOKENS = 4
"""A chat template closes a turn within so many tokens of its end."""


class Prompt(NamedTuple):
    """One prompt and the answer that the data prefer."""

    number: int
    """Its place among the prompts of the run: 0, 1, ..."""
    ids: list[int]
    text: str | list[dict[str, Any]]
    """As in the data: text, or the messages of a conversation."""
    reference: str
    """The chosen answer, as text."""


class PromptSet(NamedTuple):
    """What is asked, and how an answer ends."""

    prompts: list[Prompt]
    end_ids: list[int]
    """Tokens that end an answer."""

    def batches(self, size: int) -> list[list[Prompt]]:
        """Prompts of similar length together, so that little is padded."""
        ordered = sorted(self.prompts, key=lambda prompt: (len(prompt.ids), prompt.number))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class _Row(NamedTuple):
    ids: list[int]
    text: str | list[dict[str, Any]]
    reference: str
    chosen_ids: list[int]


def held_out_prompts(
    pairs: Any,
    tokenizer: Any,
    settings: TrackSettings,
    *,
    longest: int | None = None,
    end_ids: Iterable[int] = (),
) -> PromptSet:
    """Choose ``settings.prompts`` different prompts of ``pairs`` by ``settings.seed``.

    Args:
        pairs: a ``datasets.Dataset`` of pairs: text, conversations or token ids.
        tokenizer: the policy's.
        longest: prompts of more tokens are left out.
        end_ids: tokens that end an answer, beside the tokenizer's EOS and the special token with
            which every chosen answer ends (chat templates that close a turn have one).

    Raises:
        ValueError: no tokenizer, or no prompt that is short enough. A warning is logged where
            there are fewer prompts than wanted.
    """
    if tokenizer is None:
        raise ValueError("processing_class: expected a tokenizer of the policy, got None")
    order = list(range(len(pairs)))
    random.Random(settings.seed).shuffle(order)
    chosen: dict[tuple[int, ...], _Row] = {}
    too_long = 0
    for row in _rows(pairs, order, tokenizer):
        if longest is not None and len(row.ids) > longest:
            too_long += 1
        elif row.ids:
            chosen.setdefault(tuple(row.ids), row)
        if len(chosen) == settings.prompts:
            break
    if not chosen:
        raise ValueError(
            f"prompts: expected some of at most {longest} tokens, to leave room for an answer of "
            f"{settings.max_new_tokens}, got none in {counted(len(pairs), 'pair')}"
        )
    if len(chosen) < settings.prompts:
        logger.warning(
            "track: %s instead of %d (%s, %d with too long a prompt)",
            counted(len(chosen), "different prompt"), settings.prompts,
            counted(len(pairs), "pair"), too_long,
        )  # fmt: skip
    rows = list(chosen.values())
    ends = {*end_ids, *_closing(rows, tokenizer)}
    if isinstance(tokenizer.eos_token_id, int):
        ends.add(tokenizer.eos_token_id)
    prompts = [Prompt(number, row.ids, row.text, row.reference) for number, row in enumerate(rows)]
    return PromptSet(prompts, sorted(ends))


def longest_prompt(
    model: nn.Module, settings: TrackSettings, max_length: int | None = None
) -> int | None:
    """Tokens that a prompt may have, so that an answer fits behind it; None for any number.

    Args:
        max_length: of prompt and completion in training, where longer prompts are not seen.

    Raises:
        ValueError: the model has no more positions than an answer takes.
    """
    positions = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    limits = [] if max_length is None else [max_length - 1]
    if isinstance(positions, int) and positions > 0:
        if positions <= settings.max_new_tokens:
            raise ValueError(
                f"max_new_tokens: expected less than {positions}, the positions that the model "
                f"has, got {settings.max_new_tokens}"
            )
        limits.append(positions - settings.max_new_tokens)
    return min(limits, default=None)


def _rows(pairs: Any, order: Sequence[int], tokenizer: Any) -> Iterator[_Row]:
    """Usable rows in a random order."""
    if all(field in pairs.column_names for field in TOKEN_FIELDS):
        for place in order:
            row = pairs[place]
            ids, answer = list(row["prompt_ids"]), list(row["chosen_ids"])
            yield _Row(ids, _decode(tokenizer, ids), _decode(tokenizer, answer), answer)
        return
    # A few at a time: prompts may be far fewer than pairs.
    for start in range(0, len(order), _READ_AT_ONCE):
        part = pairs.select(order[start : start + _READ_AT_ONCE])
        found = checked_pairs(rows_of(part, "track"), "skip", SkipReport())
        checked = [(place, pair) for place, pair, _ in found]
        encoded = encode(checked, tokenizer, ("chosen", "rejected"))
        for (_, pair), (_, tokens) in zip(checked, encoded, strict=True):
            if not isinstance(tokens, BadRow):
                yield _Row(
                    tokens.prompt, pair["prompt"], _text(pair["chosen"]), tokens.completions[0]
                )


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _text(answer: str | list[dict[str, Any]]) -> str:
    """The text of a completion: of several messages the assistant's contents."""
    if isinstance(answer, str):
        return answer
    parts = []
    for message in answer:
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(block["text"] for block in content)
        parts.append(content)
    return "\n".join(part for part in parts if part)


def _closing(rows: Sequence[_Row], tokenizer: Any) -> set[int]:
    """The special token that stands last in every chosen answer, if it is always the same."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token for token, entry in added.items() if entry.special}
    last = [
        next((t for t in reversed(row.chosen_ids[-_CLOSING_TOKENS:]) if t in special), None)
        for row in rows
    ]
    return {last[0]} if last and last[0] is not None and len(set(last)) == 1 else set()
