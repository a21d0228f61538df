"""Formats that are recognised by their columns, beside our own.

Preferences: ShareGPT as LLaMA-Factory has it (``conversations`` or ``messages``, and the next turn
in ``chosen`` and ``rejected``), Alpaca's and Orca's (``instruction`` and ``input``, or
``question``, or ``input``, with ``system``), and Argilla's names ``chosen_response`` and
``rejected_response``. Examples: the same with one answer, in the last turn or in ``output``.

Our own fields come first. A column that could be the prompt is not read where both sides repeat it,
as those of Anthropic's HH-RLHF and of UltraFeedback binarized do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fastdaa.data.assemble import (
    Question,
    conversations_from,
    examples_from,
    is_conversation,
    pairs_from,
    prompts_from,
    repeat_their_prompt,
)
from fastdaa.data.errors import BadRow
from fastdaa.data.formats import Format, Record, renamed_format

SIDES = ("chosen", "rejected")
_RESPONSES = ("chosen_response", "rejected_response")
_CONVERSATIONS = ("conversations", "messages")
_INSTRUCTIONS = ("instruction", "question", "input")
_OUTPUTS = ("completion", "output", "response")


def pair_format(record: Record, named: Collection[str] = ()) -> Format | None:
    """The format of a preference pair; None for a record without ``chosen`` and ``rejected``.

    Args:
        named: fields that the user has named the columns of.

    Raises:
        BadRow: columns that can be read in several ways.
    """
    given = _given(record)
    pairs = [names for names in (SIDES, _RESPONSES) if given & {*names}]
    if not pairs:
        return None
    sides = pairs[0]
    plain = {} if sides == SIDES else dict(zip(SIDES, sides, strict=True))
    if "prompt" in given and "messages" not in named:
        return renamed_format(plain)
    questions = _questions(record, named)
    if not questions:
        return renamed_format(plain)
    answers = [record.get(name) for name in sides]
    for question in questions:
        if repeat_their_prompt(answers, question.text(record)):
            unread = f"{question.columns[0]!r} is not read, since {_both(sides)} repeat the prompt"
            # Two answers may begin alike by chance.
            return renamed_format(plain, unread, tentative=isinstance(answers[0], str))
    question = _only(questions)
    if len(pairs) > 1:
        raise _ambiguous("the preferred answer", [names[0] for names in pairs], "chosen_column")
    meaning = f"{question.shown(record)} read as the prompt, and {_both(sides)} as its answers"
    return Format(meaning, {**plain, "prompt": question.columns[0]}, pairs_from(question, sides))


def example_format(
    record: Record, named: Collection[str] = (), *, prompts_only: bool = False
) -> Format | None:
    """The format of a prompt with one completion, or of a prompt; None where nothing tells it.

    Args:
        named: fields that the user has named the columns of.
        prompts_only: no completion is needed, and none is read.

    Raises:
        BadRow: columns that can be read in several ways.
    """
    given = _given(record)
    if "prompt" in given and "messages" not in named and (prompts_only or "completion" in given):
        return Format()
    if "completion" not in given:
        pairs = pair_format(record, named)
        if pairs is not None:
            return pairs
        if "messages" in given or ("text" in given and not prompts_only):
            return Format()
    questions = _questions(record, named)
    if not questions:
        return None
    question = _only(questions)
    if question.is_conversation and "completion" not in given:
        meaning = f"{question.shown(record)} read as the conversation"
        convert = conversations_from(question, prompts_only=prompts_only)
        return Format(meaning, {"messages": question.columns[0]}, convert)
    if prompts_only:
        return Format(f"{question.shown(record)} read as the prompt", {}, prompts_from(question))
    answers = [name for name in _OUTPUTS if name in given]
    if len(answers) > 1:
        raise _ambiguous("the completion", answers, "completion_column")
    if not answers:
        return None
    meaning = f"{question.shown(record)} read as the prompt and {answers[0]!r} as the completion"
    columns = {"prompt": question.columns[0], "completion": answers[0]}
    return Format(meaning, columns, examples_from(question, answers[0]))


def _given(record: Record) -> set[str]:
    return {name for name, value in record.items() if value is not None}


def _questions(record: Record, named: Collection[str]) -> list[Question]:
    """All that may be the prompt of a record without ``prompt``."""
    if "messages" in named:
        return [Question(("messages",), True)]
    found = [
        Question((name,), True) for name in _CONVERSATIONS if is_conversation(record.get(name))
    ]
    texts = [name for name in _INSTRUCTIONS if isinstance(record.get(name), str)]
    if "instruction" in texts or ("input" in texts and "instruction" in record):
        # Some of its rows have an input, maybe not the first.
        found.append(Question(("instruction", "input"), False))
        texts = [name for name in texts if name not in ("instruction", "input")]
    return found + [Question((name,), False) for name in texts]


def _only(questions: Sequence[Question]) -> Question:
    if len(questions) > 1:
        names = [question.columns[0] for question in questions]
        raise _ambiguous("the prompt", names, "prompt_column or messages_column")
    return questions[0]


def _ambiguous(what: str, columns: Sequence[str], option: str) -> BadRow:
    return BadRow(
        "ambiguous columns",
        f"expected one column with {what}, got {_both(columns)}; say which with {option}",
    )


def _both(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))
