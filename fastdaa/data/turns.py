"""Messages of a conversation, checked one by one; those of ShareGPT become ordinary ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fastdaa.data.errors import BadRow, bad_field, describe

ROLES = (
    "system",
    "developer",
    "user",
    "assistant",
    "model",
    "tool",
    "function",
    "ipython",
    "environment",
    "document",
    "control",
)
ANSWERING = ("assistant", "model")
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
_SHOWN_BY_PYTHON = re.compile(r"\s*\[\s*\{'(role|content|from|value)':")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""What ``from`` says, and the role that it is; see ``data/README.md`` of LLaMA-Factory."""


def read_turns(field: str, value: Any) -> str | list[dict[str, Any]]:
    """Text as it is, or messages checked one by one; those in JSON text are read out of it.

    Raises:
        BadRow: it is neither.
    """
    if isinstance(value, str):
        value = _out_of_json(field, value)
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        expected = "text or a list of messages"
        raise bad_field("neither text nor messages", field, expected, describe(value))
    return [_read_message(f"{field}[{index}]", message) for index, message in enumerate(value)]


def _out_of_json(field: str, text: str) -> Any:
    """Messages that were written as text, which would be learnt with brackets and quotes."""
    if not _LIST_OF_OBJECTS.match(text):
        return text
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        if _SHOWN_BY_PYTHON.match(text):
            got = "a list of messages as Python shows it; write it with json.dumps"
            raise bad_field("wrong messages", field, "text or a list of messages", got) from None
        return text
    return read if all(map(_has_role, read)) else text


def _has_role(value: Any) -> bool:
    """Whether a value is a message of somebody who is known, not any object with those fields."""
    if not is_message(value):
        return False
    return value.get("role") in ROLES or value.get("from") in [*_SHAREGPT_ROLES]


def is_message(value: Any) -> bool:
    """Whether a value has the two fields of a message, or of one of ShareGPT's."""
    return isinstance(value, Mapping) and (
        value.keys() >= {"from", "value"} or value.keys() >= {"role", "content"}
    )


def check_last_role(field: str, turns: list[dict[str, Any]]) -> None:
    """Raise ``BadRow`` where the last message is not one of the model."""
    if turns[-1]["role"] not in ANSWERING:
        got = f"one from {turns[-1]['role']!r}"
        raise bad_field("wrong messages", field, "a last message from 'assistant'", got)


def check_content(field: str, turns: list[dict[str, Any]]) -> None:
    """Raise ``BadRow`` where no message has content or calls a tool."""
    if not any(_says_something(turn) for turn in turns):
        raise bad_field("empty completion", field, "an answer with content", "an empty one")


def without_nulls(value: Any) -> Any:
    """``value`` without the null entries that columnar files add to nested objects."""
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(entry) for entry in value]
    return value


def _read_message(field: str, message: Any) -> dict[str, Any]:
    expected = "a message {'role': ..., 'content': ...}"
    if not isinstance(message, Mapping):
        raise bad_field("wrong messages", field, expected, describe(message))
    message = without_nulls(message)
    if "role" not in message:
        if message.keys() >= {"from", "value"}:
            return _from_sharegpt(field, message["from"], message["value"])
        got = f"one with only {sorted(message)}"
        raise bad_field("wrong messages", field, expected, got)
    if message["role"] not in ROLES:
        raise _unknown(f"{field}.role", ROLES, message["role"])
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return message
    if isinstance(content, list) and all(_is_text_block(block) for block in content):
        return message
    raise bad_field("wrong messages", f"{field}.content", "text", describe(content))


def _from_sharegpt(field: str, sender: Any, value: Any) -> dict[str, Any]:
    if not isinstance(sender, str) or sender not in _SHAREGPT_ROLES:
        raise _unknown(f"{field}.from", _SHAREGPT_ROLES, sender)
    if not isinstance(value, str):
        raise bad_field("wrong messages", f"{field}.value", "text", describe(value))
    role = _SHAREGPT_ROLES[sender]
    if sender != "function_call":
        return {"role": role, "content": value}
    return {"role": role, "tool_calls": _function_calls(f"{field}.value", value)}


def _function_calls(field: str, text: str) -> list[dict[str, Any]]:
    """The calls of a ``function_call`` turn: one of them, or a list, as JSON."""
    try:
        read = json.loads(text)
    except json.JSONDecodeError:
        read = None
    calls = read if isinstance(read, list) else [read]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        expected = "a call {'name': ..., 'arguments': ...} as JSON, or a list of them"
        raise bad_field("wrong messages", field, expected, describe(text))
    return [{"type": "function", "function": without_nulls(call)} for call in calls]


def _unknown(field: str, known: Any, got: Any) -> BadRow:
    return bad_field("wrong messages", field, f"one of {', '.join(known)}", describe(got))


def _is_text_block(block: Any) -> bool:
    return isinstance(block, Mapping) and isinstance(block.get("text"), str)


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(block["text"] for block in content)
    return bool(content or message.get("tool_calls"))
