"""What a preference pair must look like, and the one form that all pairs are brought into."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastdaa.data.errors import BadRow, bad_field, describe, mixed_formats
from fastdaa.data.turns import check_content, check_last_role, read_turns, without_nulls

PAIR_FIELDS = ("prompt", "chosen", "rejected")
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")


def normalise_pair(record: Any) -> dict[str, Any]:
    """Checks one record and brings it into the explicit form.

    Args:
        record: a mapping with ``chosen`` and ``rejected``, and optionally ``prompt``, ``tools``
            and ``chat_template_kwargs``; other fields are not looked at.

    Returns:
        ``prompt``, ``chosen``, ``rejected`` (all strings, or all lists of messages), and, for
        conversations that have them, ``tools`` (a JSON string) and ``chat_template_kwargs`` (a
        dict).

    Raises:
        BadRow: says the field, what was expected and what came.
    """
    if not isinstance(record, Mapping):
        raise BadRow("not an object", f"expected an object with fields, got {describe(record)}")
    for field in ("image", "images"):
        if record.get(field):
            raise bad_field("images", field, "text only", "images, which are not supported")
    for field in ("chosen", "rejected"):
        if field not in record:
            got = f"only {', '.join(map(repr, record)) or 'no fields'}"
            if "label" in record and "completion" in record:
                got += (
                    "; rows with a label are unpaired data, for --loss kto, bco or apo_zero of "
                    "`fastdaa train`, without other losses"
                )
            elif record and "rejected" not in record and field == "chosen":
                got += "; chosen_column and rejected_column say which columns hold the answers"
            raise bad_field("missing field", field, "text or a list of messages", got)
    asked = record.get("prompt")
    pair = {field: _read_side(field, record[field], asked) for field in ("chosen", "rejected")}
    conversational = isinstance(pair["chosen"], list)
    if isinstance(pair["rejected"], list) != conversational:
        raise mixed_formats("rejected", pair["rejected"], "as in 'chosen'")
    if pair["chosen"] == pair["rejected"]:
        got = f"the same: {describe(pair['rejected'])}"
        raise bad_field("chosen equals rejected", "rejected", "another answer than 'chosen'", got)
    pair = _with_prompt(pair, record.get("prompt"), conversational)
    if conversational:
        pair.update(template_fields(record))
    return pair


def is_conversational(pair: Mapping[str, Any]) -> bool:
    """Whether a normalised pair consists of messages and not of plain text."""
    return isinstance(pair["chosen"], list)


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Splits an implicit prompt off two sequences of turns, or two strings.

    The prompt is the longest common prefix, which leaves at least the last turn (character) of
    both; for strings, one space before the completions belongs to them and not to the prompt.

    Returns:
        Prompt, chosen completion, rejected completion.
    """
    common = common_prefix(chosen, rejected)
    split = min(common, len(chosen) - 1, len(rejected) - 1)
    if split == common > 0 and isinstance(chosen, str) and chosen[split - 1] == " ":
        split -= 1
    return chosen[:split], chosen[split:], rejected[split:]


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of leading items that two strings or lists have in common."""
    known, limit = 0, min(len(first), len(second))
    # Halving compares slices at the speed of C; long equal prefixes are the usual case.
    step = limit
    while known < limit:
        step = min(step, limit - known)
        if first[known : known + step] == second[known : known + step]:
            known += step
        elif step == 1:
            break
        else:
            step //= 2
    return known


def _with_prompt(pair: dict[str, Any], prompt: Any, conversational: bool) -> dict[str, Any]:
    read = None if prompt is None else read_turns("prompt", prompt)
    if read is None or (conversational and isinstance(read, str)):
        # Some sets repeat the first question as text beside two whole conversations.
        parts = split_prompt(pair["chosen"], pair["rejected"])
        if conversational and not parts[0] and prompt is not None:
            raise bad_field(
                "mixed formats", "prompt", "a list of messages as in 'chosen'", describe(prompt)
            )
        if conversational and not parts[0]:
            raise bad_field(
                "missing prompt", "prompt", "it, or a first message common to both sides", "neither"
            )
        pair = dict(zip(PAIR_FIELDS, parts, strict=True))
    else:
        if isinstance(read, list) != conversational:
            expected = "a list of messages" if conversational else "text"
            raise bad_field(
                "mixed formats", "prompt", f"{expected} as in 'chosen'", describe(prompt)
            )
        if read == []:
            raise bad_field("missing prompt", "prompt", "at least one message", "an empty list")
        pair = {"prompt": read, **pair}
    if conversational:
        for field in ("chosen", "rejected"):
            check_content(field, pair[field])
    return pair


def _read_side(field: str, value: Any, prompt: Any) -> str | list[dict[str, Any]]:
    # A single message is a list of one.
    turns = read_turns(field, [value] if isinstance(value, Mapping) else value)
    if isinstance(value, str) and isinstance(turns, list) and isinstance(prompt, str):
        first = next((turn.get("content") for turn in turns if turn["role"] == "user"), prompt)
        if first != prompt and isinstance(read_turns("prompt", prompt), str):
            turns = value  # an answer that shows a conversation, to another question
    if not turns:
        raise bad_field("empty completion", field, "an answer with content", "an empty one")
    if isinstance(turns, list):
        check_last_role(field, turns)
    return turns


def template_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """``tools`` (JSON text) and ``chat_template_kwargs`` of a record that has them.

    Raises:
        BadRow: they are of another kind.
    """
    found: dict[str, Any] = {}
    tools = _parse_json("tools", record.get("tools"), list)
    if tools and not all(isinstance(tool, Mapping) for tool in tools):
        raise bad_field("wrong tools", "tools", "a list of objects", describe(tools))
    if tools:
        given = record["tools"]
        found["tools"] = given if isinstance(given, str) else json.dumps(without_nulls(tools))
    options = _parse_json("chat_template_kwargs", record.get("chat_template_kwargs"), dict)
    if options:
        found["chat_template_kwargs"] = without_nulls(options)
    return found


def _parse_json(field: str, value: Any, kind: type) -> Any:
    expected = f"{'a list' if kind is list else 'an object'} or a JSON string of one"
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise bad_field(f"wrong {field}", field, expected, f"broken JSON ({error})") from None
    if value and not isinstance(value, kind):
        raise bad_field(f"wrong {field}", field, expected, describe(value))
    return value or None
