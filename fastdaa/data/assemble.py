"""Conversations put together from the columns of other formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastdaa.data.errors import BadRow, bad_field, describe
from fastdaa.data.turns import ANSWERING, is_message, read_turns
from fastdaa.data.validate import common_prefix

Record = Mapping[str, Any]
_BESIDE = ("system", "history")


class Question(NamedTuple):
    """The columns of a record that ask.

    Attributes:
        columns: one with a conversation or a text, or an instruction and its input.
        is_conversation: it holds messages.
    """

    columns: tuple[str, ...]
    is_conversation: bool

    def shown(self, record: Record) -> str:
        """The columns that ``record`` has, with the verb that follows."""
        beside = _BESIDE[:1] if self.is_conversation else _BESIDE
        names = [repr(name) for name in self.columns if name in record]
        names += [repr(name) for name in beside if record.get(name)]
        *others, last = names
        return f"{', '.join(others)} and {last} are" if others else f"{last} is"

    def text(self, record: Record) -> str:
        """What is asked last, as text; nothing where it cannot be told."""
        value = record.get(self.columns[0])
        if self.is_conversation:
            turns = messages_in(value)
            last = turns[-1] if isinstance(turns, list) and turns else None
            value = last.get("content") or last.get("value") if isinstance(last, Mapping) else None
        return value.strip() if isinstance(value, str) else ""

    def turns(self, record: Record) -> list[dict[str, Any]]:
        """The conversation so far, with the system's message and earlier turns in their columns.

        Raises:
            BadRow: a column does not hold what it should.
        """
        return self._conversation(record) if self.is_conversation else self._instruction(record)

    def _conversation(self, record: Record) -> list[dict[str, Any]]:
        column = self.columns[0]
        if record.get(column) is None:
            raise _missing(record, column, "a list of messages")
        turns = read_turns(column, messages_in(record[column]))
        if not isinstance(turns, list) or not turns:
            got = describe(record[column])
            raise bad_field("missing prompt", column, "a list with at least one message", got)
        # The conversation's own counts, as in LLaMA-Factory.
        return turns if turns[0]["role"] == "system" else [*_system(record), *turns]

    def _instruction(self, record: Record) -> list[dict[str, Any]]:
        texts = [record.get(column) for column in self.columns]
        for column, text in zip(self.columns, texts, strict=True):
            if text is not None and not isinstance(text, str):
                raise bad_field("wrong prompt", column, "text", describe(text))
        asked = "\n".join(text for text in texts if text)
        if not asked:
            raise _missing(record, self.columns[0], "text")
        return [*_system(record), *_history(record), {"role": "user", "content": asked}]

    def rest(self, record: Record, read: Sequence[str]) -> dict[str, Any]:
        """The columns that neither ask nor were ``read``."""
        taken = {*self.columns, *_BESIDE, *read}
        return {name: value for name, value in record.items() if name not in taken}


def is_conversation(value: Any) -> bool:
    """Whether a value may be a list of messages, or the JSON text of one."""
    return isinstance(messages_in(value), list | tuple)


def repeat_their_prompt(sides: Sequence[Any], asked: str) -> bool:
    """Whether both sides of a pair begin with what is asked.

    Args:
        sides: as in the record.
        asked: text.
    """
    first, second = sides
    if isinstance(first, list) and isinstance(second, list):
        return len(first) > 1 and len(second) > 1 and first[0] == second[0]
    if isinstance(first, str) and isinstance(second, str) and asked:
        return asked in first[: common_prefix(first, second)]
    return False


def pairs_from(question: Question, sides: Sequence[str]) -> Callable[[Record], Record]:
    """From records with a question and two answers in ``sides`` to ours."""

    def convert(record: Record) -> Record:
        turns = question.turns(record)
        _check_open(question, turns)
        answers = [_answer(record, side) for side in sides]
        pair = dict(zip(("prompt", "chosen", "rejected"), (turns, *answers), strict=True))
        return {**question.rest(record, sides), **pair}

    return convert


def examples_from(question: Question, output: str) -> Callable[[Record], Record]:
    """From records with a question and an answer in ``output`` to ours."""

    def convert(record: Record) -> Record:
        turns = question.turns(record)
        _check_open(question, turns)
        answered = {"prompt": turns, "completion": _answer(record, output)}
        return {**question.rest(record, (output,)), **answered}

    return convert


def prompts_from(question: Question) -> Callable[[Record], Record]:
    """From records with a question to ours."""
    return lambda record: {**question.rest(record, ()), "prompt": question.turns(record)}


def conversations_from(question: Question, *, prompts_only: bool) -> Callable[[Record], Record]:
    """From records with a whole conversation to ours; a prompt may lack the last answer."""

    def convert(record: Record) -> Record:
        turns = question.turns(record)
        rest = question.rest(record, ())
        if prompts_only and turns[-1]["role"] not in ANSWERING:
            return {**rest, "prompt": turns}
        return {**rest, "messages": turns}

    return convert


def _check_open(question: Question, turns: Sequence[Mapping[str, Any]]) -> None:
    if turns[-1]["role"] in ANSWERING:
        raise bad_field(
            "wrong messages", question.columns[0], "a last turn that the answers can follow",
            f"one from {turns[-1]['role']!r}",
        )  # fmt: skip


def _answer(record: Record, column: str) -> Any:
    """Text as a turn of the assistant; messages as they are."""
    value = record.get(column)
    if value is None:
        raise _missing(record, column, "text or messages")
    value = messages_in(value)
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _missing(record: Record, column: str, expected: str) -> BadRow:
    absent = f"only {', '.join(map(repr, record))}"
    got = describe(record[column]) if column in record else absent
    return bad_field("missing field", column, expected, got)


def _system(record: Record) -> list[dict[str, Any]]:
    text = record.get("system")
    if text is not None and not isinstance(text, str):
        raise bad_field("wrong prompt", "system", "text", describe(text))
    return [{"role": "system", "content": text}] if text else []


def _history(record: Record) -> list[dict[str, Any]]:
    """Earlier questions and answers, as Alpaca's ``history`` holds them."""
    turns: list[dict[str, Any]] = []
    for index, exchange in enumerate(record.get("history") or ()):
        whole = isinstance(exchange, list | tuple) and len(exchange) == 2
        if not whole or not all(isinstance(text, str) for text in exchange):
            expected = "a question and its answer"
            raise bad_field("wrong prompt", f"history[{index}]", expected, describe(exchange))
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            turns.append({"role": role, "content": text})
    return turns


def messages_in(value: Any) -> Any:
    """A message or a list of them out of JSON text, as CSV holds it; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[{", "{")):
        return value
    try:
        read = json.loads(value)
    except json.JSONDecodeError:
        return value
    return value if isinstance(read, dict) and not is_message(read) else read
