"""What a pair must look like: every refusal names the field, what was expected and what came."""

from __future__ import annotations

import re

import pytest

from fastdaa.data import DataError
from fastdaa.data.validate import BadRow, common_prefix, normalise_pair, split_prompt


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def bot(text: str | None, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        (7, "not an object", "expected an object with fields, got int 7"),
        (
            {"prompt": "p", "chosen": "a"},
            "missing field",
            "field 'rejected': expected text or a list of messages, got only 'prompt', 'chosen'",
        ),
        ({}, "missing field", "field 'chosen': expected text or a list of messages, got only no"),
        (
            {"prompt": "p", "chosen": 3, "rejected": "b"},
            "neither text nor messages",
            "field 'chosen': expected text or a list of messages, got int 3",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": None},
            "neither text nor messages",
            "field 'rejected': expected text or a list of messages, got null",
        ),
        (
            {"prompt": 1.5, "chosen": "a", "rejected": "b"},
            "neither text nor messages",
            "field 'prompt': expected text or a list of messages, got float 1.5",
        ),
        (
            {"prompt": "p", "chosen": "", "rejected": "b"},
            "empty completion",
            "field 'chosen': expected an answer with content, got an empty one",
        ),
        (
            {"prompt": [user("p")], "chosen": [bot("a")], "rejected": []},
            "empty completion",
            "field 'rejected': expected an answer with content, got an empty one",
        ),
        (
            {"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot("")]},
            "empty completion",
            "field 'rejected': expected an answer with content, got an empty one",
        ),
        (
            {"prompt": "p", "chosen": "same", "rejected": "same"},
            "chosen equals rejected",
            "field 'rejected': expected another answer than 'chosen', got the same: 'same'",
        ),
        (
            {"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot("a")]},
            "chosen equals rejected",
            "field 'rejected': expected another answer than 'chosen', got the same: list",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": [bot("b")]},
            "mixed formats",
            "field 'rejected': expected text as in 'chosen', got a list of messages",
        ),
        (
            {"prompt": [user("p")], "chosen": "a", "rejected": "b"},
            "mixed formats",
            "field 'prompt': expected text as in 'chosen', got list",
        ),
        (
            {"prompt": "p", "chosen": [bot("a")], "rejected": [bot("b")]},
            "mixed formats",
            "field 'prompt': expected a list of messages as in 'chosen', got 'p'",
        ),
        (
            {"chosen": [bot("a")], "rejected": [bot("b")]},
            "missing prompt",
            "field 'prompt': expected it, or a first message common to both sides, got neither",
        ),
        (
            {"prompt": [], "chosen": [bot("a")], "rejected": [bot("b")]},
            "missing prompt",
            "field 'prompt': expected at least one message, got an empty list",
        ),
        (
            {"prompt": [user("p"), "hello"], "chosen": [bot("a")], "rejected": [bot("b")]},
            "wrong messages",
            "field 'prompt[1]': expected a message {'role': ..., 'content': ...}, got 'hello'",
        ),
        (
            {"prompt": [user("p")], "chosen": [{"from": "gpt", "value": None}], "rejected": "b"},
            "wrong messages",
            "field 'chosen[0]': expected a message {'role': ..., 'content': ...}, got one with "
            "only ['from']",
        ),
        (
            {"prompt": [user("p")], "chosen": [{"content": "a"}], "rejected": "b"},
            "wrong messages",
            "field 'chosen[0]': expected a message {'role': ..., 'content': ...}, got one with "
            "only ['content']",
        ),
        (
            {"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot(7)]},
            "wrong messages",
            "field 'rejected[0].content': expected text, got int 7",
        ),
        (
            {
                "prompt": [{"role": "human", "content": "p"}],
                "chosen": [bot("a")],
                "rejected": [bot("b")],
            },
            "wrong messages",
            "field 'prompt[0].role': expected one of system, developer, user, assistant, model, "
            "tool, function, ipython, environment, document, control, got 'human'",
        ),
        (
            {"prompt": [user("p")], "chosen": [bot("a"), user("q")], "rejected": [bot("b")]},
            "wrong messages",
            "field 'chosen': expected a last message from 'assistant', got one from 'user'",
        ),
        (
            {"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot("b")], "tools": "[{"},
            "wrong tools",
            "field 'tools': expected a list or a JSON string of one, got broken JSON",
        ),
        (
            {"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot("b")], "tools": ["f"]},
            "wrong tools",
            "field 'tools': expected a list of objects, got list ['f']",
        ),
        (
            {
                "prompt": [user("p")],
                "chosen": [bot("a")],
                "rejected": [bot("b")],
                "chat_template_kwargs": [1],
            },
            "wrong chat_template_kwargs",
            "field 'chat_template_kwargs': expected an object or a JSON string of one, got list",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "images": ["x.png"]},
            "images",
            "field 'images': expected text only, got images, which are not supported",
        ),
    ],
)
def test_refusals(record, reason: str, message: str) -> None:
    with pytest.raises(BadRow, match="^" + re.escape(message)) as caught:
        normalise_pair(record)
    assert caught.value.reason == reason
    assert isinstance(caught.value, DataError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "score": 3},
            {"prompt": "p", "chosen": "a", "rejected": "b"},
        ),
        (
            {"prompt": "", "chosen": " ", "rejected": "b"},
            {"prompt": "", "chosen": " ", "rejected": "b"},
        ),
        (
            {"prompt": "q", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
            {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]},
        ),
        (
            {
                "prompt": [user("p")],
                "chosen": [bot(None, tool_calls=[CALL])],
                "rejected": [bot("b")],
            },
            {
                "prompt": [user("p")],
                "chosen": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
                        ],
                    }
                ],
                "rejected": [bot("b")],
            },
        ),
        (
            {
                "prompt": [user("p")],
                "chosen": [bot("a")],
                "rejected": [bot("b")],
                "tools": [{"name": "f"}],
                "chat_template_kwargs": {"thinking": False, "other": None},
            },
            {
                "prompt": [user("p")],
                "chosen": [bot("a")],
                "rejected": [bot("b")],
                "tools": '[{"name": "f"}]',
                "chat_template_kwargs": {"thinking": False},
            },
        ),
    ],
    ids=["text", "empty prompt", "text prompt beside whole chats", "tool calls", "tools"],
)
def test_normal_form(record: dict, expected: dict) -> None:
    assert normalise_pair(record) == expected


def test_content_in_text_blocks_is_kept() -> None:
    blocks = [{"type": "text", "text": "a"}]
    pair = normalise_pair({"prompt": [user("p")], "chosen": [bot(blocks)], "rejected": [bot("b")]})
    assert pair["chosen"][0]["content"] == blocks
    with pytest.raises(BadRow, match=r"chosen\[0\].content"):
        normalise_pair(
            {"prompt": [user("p")], "chosen": [bot([{"type": "image"}])], "rejected": "b"}
        )


@pytest.mark.parametrize(
    ("chosen", "rejected", "split"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("ab", "ac", ("a", "b", "c")),
        ("ab", "xy", ("", "ab", "xy")),
        ("a b", "a c", ("a", " b", " c")),
        (" a", " b", ("", " a", " b")),
        ("abc", "abcdef", ("ab", "c", "cdef")),
        ("abcdef", "abc", ("ab", "cdef", "c")),
        ("a ", "a bc", ("a", " ", " bc")),
        ("ends with x ", "ends with y ", ("ends with", " x ", " y ")),
        ([user("p"), bot("a")], [user("p"), bot("b")], ([user("p")], [bot("a")], [bot("b")])),
        (
            [user("p"), bot("a")],
            [user("p"), bot("a"), user("q"), bot("b")],
            ([user("p")], [bot("a")], [bot("a"), user("q"), bot("b")]),
        ),
        ([bot("a")], [bot("b")], ([], [bot("a")], [bot("b")])),
    ],
)
def test_implicit_prompts(chosen, rejected, split) -> None:
    assert split_prompt(chosen, rejected) == split


def test_common_prefix_against_a_loop() -> None:
    texts = ["", "a", "ab", "abab", "abba", "b" * 9, "b" * 8 + "a", "abcabcabd", "abcabcabc"]
    for first in texts:
        for second in texts:
            expected = 0
            while first[expected : expected + 1] == second[expected : expected + 1] != "":
                expected += 1
            assert common_prefix(first, second) == expected
            assert common_prefix(list(first), list(second)) == expected
