"""Prompts and single completions, in any of the usual forms, checked.

A record is one of: ``prompt`` and ``completion``; a preference pair, of which the chosen side is
taken; ``messages``, a conversation whose last answer is the completion; ``text``, which is all
completion; where prompts alone are wanted, ``prompt``; or has one of the formats of
:mod:`fastdaa.data.known_formats`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from fastdaa.data.assemble import messages_in
from fastdaa.data.bad_rows import OnBadRow, good_rows
from fastdaa.data.errors import BadRow, bad_field, describe, mixed_formats
from fastdaa.data.formats import recognise
from fastdaa.data.kinds import CheckedRow, RecordKind
from fastdaa.data.known_formats import example_format
from fastdaa.data.readers import Records
from fastdaa.data.reports import SkipReport
from fastdaa.data.turns import ANSWERING, check_content, check_last_role, read_turns
from fastdaa.data.validate import normalise_pair, template_fields

logger = logging.getLogger(__name__)
EXAMPLE_FIELDS = ("prompt", "completion")
_KINDS = "'prompt' and 'completion', 'chosen' and 'rejected', 'messages' or 'text'"


def normalise_example(record: Any, prompts_only: bool = False) -> dict[str, Any]:
    """Checks one record and brings it into the form of examples.

    That is ``prompt`` and ``completion`` (all text or all lists of messages), and for conversations
    that have them ``tools`` (JSON text) and ``chat_template_kwargs``.

    Raises:
        BadRow: says the field, what was expected and what came.
    """
    if not isinstance(record, Mapping):
        raise BadRow("not an object", f"expected an object with fields, got {describe(record)}")
    given = {name for name, value in record.items() if value is not None}
    if prompts_only and "prompt" in given:
        prompt = read_turns("prompt", record["prompt"])
        if not prompt:
            raise bad_field("missing prompt", "prompt", "text or messages", "an empty one")
        example = {"prompt": prompt}
    elif "completion" in given:
        example = _with_completion(record)
    elif "chosen" in given:
        pair = normalise_pair(record)
        example = {"prompt": pair["prompt"], "completion": pair["chosen"]}
    elif "messages" in given:
        example = _conversation(record["messages"])
    elif "text" in given and not prompts_only:
        example = {"prompt": "", "completion": _whole_text(record["text"])}
    else:
        raise bad_field(
            "missing field", "prompt", _KINDS, f"only {', '.join(map(repr, record)) or 'nothing'}"
        )
    if isinstance(example["prompt"], list):
        example |= template_fields(record)
    if prompts_only:
        example.pop("completion", None)
    return example


def checked_examples(
    records: Records,
    on_bad_row: OnBadRow,
    report: SkipReport,
    prompts_only: bool = False,
    *,
    source: str = "dataset",
    columns: Mapping[str, str] | None = None,
) -> Iterator[CheckedRow]:
    """Good records, all of the first one's kind: conversations or text.

    The arguments are those of :func:`fastdaa.data.pairs.checked_pairs`.
    """
    columns = columns or {}
    find = partial(example_format, named=columns, prompts_only=prompts_only)
    found, records = recognise(records, find, source)
    first: type | None = None

    def normalise(record: Any) -> dict[str, Any]:
        nonlocal first
        example = normalise_example(record, prompts_only)
        kind = type(example["prompt"])
        first = first or kind
        if kind is not first:
            raise mixed_formats("prompt", example["prompt"], "as before")
        return example

    read = found.reader(normalise, columns)
    said = prompts_only
    for place, (record, example) in good_rows(records, read, on_bad_row, report):
        if not said and _holds_more_answers(record, example):
            said = True
            logger.warning(
                "%s: conversations hold several answers (the first: %s); the last one of each is "
                "learnt, or with every_answer all of them",
                source, place,
            )  # fmt: skip
        yield place, example, {}


EXAMPLES = RecordKind("example", EXAMPLE_FIELDS, checked_examples)
PROMPTS = RecordKind("prompt", EXAMPLE_FIELDS[:1], partial(checked_examples, prompts_only=True))


def _with_completion(record: Mapping[str, Any]) -> dict[str, Any]:
    if record.get("prompt") is None:
        raise bad_field("missing prompt", "prompt", "text or messages", "none")
    # A single message is a list of one.
    values = (record[field] for field in EXAMPLE_FIELDS)
    listed = ([value] if isinstance(value, Mapping) else value for value in values)
    prompt, completion = map(read_turns, EXAMPLE_FIELDS, listed)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise mixed_formats("completion", completion, "as in 'prompt'")
    if isinstance(completion, list):
        if not prompt:
            raise bad_field("missing prompt", "prompt", "at least one message", "an empty list")
        _check_answer("completion", completion)
    elif not completion:
        raise bad_field("empty completion", "completion", "text", "an empty one")
    return {"prompt": prompt, "completion": completion}


def _holds_more_answers(record: Mapping[str, Any], example: Mapping[str, Any]) -> bool:
    """Whether a conversation without a prompt of its own has answers before the last."""
    split = any(record.get(field) is not None for field in ("completion", "chosen"))
    turns = () if split or isinstance(example["prompt"], str) else example["prompt"]
    return any(turn["role"] in ANSWERING for turn in turns)


def _conversation(value: Any) -> dict[str, Any]:
    turns = read_turns("messages", messages_in(value))
    if not isinstance(turns, list) or len(turns) < 2:
        raise bad_field("wrong messages", "messages", "a question and an answer", repr(value)[:60])
    _check_answer("messages", turns[-1:])
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _check_answer(field: str, turns: list[dict[str, Any]]) -> None:
    check_content(field, turns)
    check_last_role(field, turns)


def _whole_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise bad_field("empty completion", "text", "text", repr(value)[:60])
    return value
