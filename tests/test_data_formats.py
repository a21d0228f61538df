"""Formats of other toolkits: what is recognised, what it is read as, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from fastdaa.data import DataError, load_pairs, read_pairs
from fastdaa.data.examples import EXAMPLES, PROMPTS
from fastdaa.data.named_columns import NamedColumns
from fastdaa.data.validate import normalise_pair

datasets = pytest.importorskip("datasets")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def turn(sender: str, text: str) -> dict[str, str]:
    return {"from": sender, "value": text}


HUMAN, GPT = turn("human", "Sky?"), turn("gpt", "Blue.")
SKY = {"prompt": [user("Sky?")], "chosen": [bot("Blue.")], "rejected": [bot("Green.")]}
SHAREGPT = {"conversations": [HUMAN], "chosen": GPT, "rejected": turn("gpt", "Green.")}
ARGILLA = {"instruction": "Sky?", "chosen_response": "Blue.", "rejected_response": "Green."}
HH = {
    "chosen": "\n\nHuman: Sky?\n\nAssistant: Blue.",
    "rejected": "\n\nHuman: Sky?\n\nAssistant: Green.",
}
HH_READ = {
    "prompt": "\n\nHuman: Sky?\n\nAssistant:", "chosen": " Blue.", "rejected": " Green.",
}  # fmt: skip
WHOLE = {"chosen": [user("Sky?"), bot("Blue.")], "rejected": [user("Sky?"), bot("Green.")]}
SIDES = {"chosen": "Blue.", "rejected": "Green."}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fields(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


def with_prompt(*turns: dict[str, str]) -> dict[str, Any]:
    return {**SKY, "prompt": [*turns, user("Sky?")]}


BEFORE = (user("Hello"), bot("Hi"))
PAIRS = {
    "ShareGPT": (SHAREGPT, SKY),
    "ShareGPT, several turns": (
        {**SHAREGPT, "conversations": [turn("human", "Hello"), turn("gpt", "Hi"), HUMAN]},
        with_prompt(*BEFORE),
    ),
    "ShareGPT, system turn": (
        {**SHAREGPT, "conversations": [turn("system", "Be brief."), HUMAN], "system": "not this"},
        with_prompt(system("Be brief.")),
    ),
    "ShareGPT, system column": (
        {**SHAREGPT, "system": "Be brief."}, with_prompt(system("Be brief."))
    ),
    "ShareGPT, empty system column": ({**SHAREGPT, "system": ""}, SKY),
    "ShareGPT, answers as text": ({"conversations": [HUMAN], **SIDES}, SKY),
    "ShareGPT, answers as lists": (
        {"conversations": [HUMAN], "chosen": [GPT], "rejected": [turn("gpt", "Green.")]}, SKY
    ),
    "ShareGPT, whole conversations": (
        {"chosen": [HUMAN, GPT], "rejected": [HUMAN, turn("chatgpt", "Green.")]}, SKY
    ),
    "messages and the next turn": (
        {"messages": [user("Sky?")], "chosen": bot("Blue."), "rejected": bot("Green.")}, SKY
    ),
    "messages and text": ({"messages": [system("s"), user("Sky?")], **SIDES},
                          with_prompt(system("s"))),
    "UltraFeedback binarized": (
        {"prompt": "Sky?", "prompt_id": "1f", "messages": [user("Sky?"), bot("Blue.")], **WHOLE,
         "score_chosen": 8.5, "score_rejected": 3.0}, SKY
    ),
    "whole conversations beside others": (
        {**WHOLE, "messages": [user("Sky?"), bot("Blue.")], "question": "What?"}, SKY
    ),
    "HH-RLHF": (HH, HH_READ),
    "HH-RLHF beside its question": ({**HH, "question": "Sky?", "input": "x"}, HH_READ),
    "Argilla": ({**ARGILLA, "chosen_rating": 5, "rejected_rating": 1}, SKY),
    "Argilla, input column": ({**ARGILLA, "instruction": None, "input": "Sky?"}, SKY),
    "Argilla, text prompt": (
        {"prompt": "Sky:", "chosen_response": " blue", "rejected_response": " red"},
        {"prompt": "Sky:", "chosen": " blue", "rejected": " red"},
    ),
    "Argilla, whole conversations": (
        {"chosen_response": WHOLE["chosen"], "rejected_response": WHOLE["rejected"]}, SKY
    ),
    "Orca": ({"system": "Be brief.", "question": "Sky?", **SIDES},
             with_prompt(system("Be brief."))),
    "distilabel Orca": ({"system": "", "input": "Sky?", **SIDES, "rating": [4.0, 2.0]}, SKY),
    "Alpaca": ({"instruction": "Answer:", "input": "Sky?", **SIDES},
               {**SKY, "prompt": [user("Answer:\nSky?")]}),
    "Alpaca, empty input": ({"instruction": "Sky?", "input": "", **SIDES}, SKY),
    "Alpaca, history": (
        {"instruction": "Sky?", "history": [["Hello", "Hi"]], "system": "s", **SIDES},
        with_prompt(system("s"), *BEFORE),
    ),
    "question beside answering turns": (
        {"question": "Sky?", "chosen": [bot("Blue.")], "rejected": [bot("Green.")]}, SKY
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), PAIRS.values(), ids=PAIRS)
def test_pairs(tmp_path: Path, record: dict[str, Any], expected: dict[str, Any]) -> None:
    second = {**record, "other": 1}
    (first, again) = load_pairs(write(tmp_path / "pairs.jsonl", record, second))
    assert fields(first) == fields(again) == expected


CALL = '{"name": "look", "arguments": {"where": "up"}}'
CALLED = {"type": "function", "function": {"name": "look", "arguments": {"where": "up"}}}


def test_tools_of_sharegpt(tmp_path: Path) -> None:
    record = {
        "conversations": [HUMAN, turn("function_call", CALL), turn("observation", "blue")],
        "chosen": GPT, "rejected": turn("function_call", f"[{CALL}]"),
        "tools": '[{"name": "look"}]',
    }  # fmt: skip
    (pair,) = load_pairs(write(tmp_path / "pairs.jsonl", record))
    asked = {"role": "assistant", "tool_calls": [CALLED]}
    assert pair["prompt"] == [user("Sky?"), asked, {"role": "tool", "content": "blue"}]
    assert pair["rejected"] == [asked]
    assert pair["tools"] == '[{"name": "look"}]'


def test_tools_of_messages(tmp_path: Path) -> None:
    asked = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    told = {"role": "tool", "name": "look", "content": "blue"}
    turns = [system("s"), user("Sky?"), asked, told]
    source = write(tmp_path / "chats.jsonl", {"messages": [*turns, bot("Blue.")], "tools": "[{}]"})
    (example,) = EXAMPLES.load(source)
    assert (example["prompt"], example["completion"]) == (turns, [bot("Blue.")])
    assert example["tools"] == "[{}]"


def write_csv(path: Path, *rows: dict[str, Any]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return path


def write_parquet(path: Path, *rows: dict[str, Any]) -> Path:
    datasets.Dataset.from_list([*rows]).to_parquet(path)
    return path


def write_zipped(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    return path


@pytest.mark.parametrize(
    ("name", "save", "record"),
    [
        ("pairs.parquet", write_parquet, SHAREGPT),
        ("argilla.parquet", write_parquet, ARGILLA),
        ("pairs.json.gz", write_zipped, SHAREGPT),
        ("pairs.csv", write_csv, {"conversations": [HUMAN], **SIDES}),
        ("messages.csv", write_csv, SHAREGPT),
        ("argilla.csv", write_csv, ARGILLA),
    ],
)
def test_files(tmp_path: Path, name: str, save: Any, record: dict[str, Any]) -> None:
    rows = [record, {**record, "other": 1}][: 1 + (save is write_zipped)]
    loaded = load_pairs(save(tmp_path / name, *rows))
    assert [fields(pair) for pair in loaded] == [SKY] * len(rows)


BROKEN = {
    "unknown sender": (
        SHAREGPT, {**SHAREGPT, "conversations": [turn("alien", "Sky?")]},
        "field 'conversations[0].from': expected one of human, user, gpt, chatgpt, assistant, "
        "system, function_call, observation, tool, got 'alien'",
    ),
    "no value": (
        SHAREGPT, {**SHAREGPT, "conversations": [{"from": "human", "value": None}]},
        "field 'conversations[0]': expected a message {'role': ..., 'content': ...}, got one with "
        "only ['from']",
    ),
    "value is no text": (
        SHAREGPT, {**SHAREGPT, "chosen": turn("gpt", 7)},  # type: ignore[arg-type]
        "field 'chosen[0].value': expected text, got int 7",
    ),
    "conversation is answered": (
        SHAREGPT, {**SHAREGPT, "conversations": [HUMAN, GPT]},
        "field 'conversations': expected a last turn that the answers can follow, got one from "
        "'assistant'",
    ),
    "empty conversation": (
        SHAREGPT, {**SHAREGPT, "conversations": []},
        "field 'conversations': expected a list with at least one message, got list []",
    ),
    "conversation is text": (
        SHAREGPT, {**SHAREGPT, "conversations": "Sky?"},
        "field 'conversations': expected a list with at least one message, got 'Sky?'",
    ),
    "no rejected": (
        SHAREGPT, {"conversations": [HUMAN], "chosen": GPT},
        "field 'rejected': expected text or messages, got only 'conversations', 'chosen'",
    ),
    "answer of the user": (
        SHAREGPT, {**SHAREGPT, "rejected": HUMAN},
        "field 'rejected': expected a last message from 'assistant', got one from 'user'",
    ),
    "empty answer": (
        SHAREGPT, {**SHAREGPT, "rejected": turn("gpt", "")},
        "field 'rejected': expected an answer with content, got an empty one",
    ),
    "same answer": (
        SHAREGPT, {**SHAREGPT, "rejected": "Blue."},
        "field 'rejected': expected another answer than 'chosen', got the same: list",
    ),
    "broken call": (
        SHAREGPT, {**SHAREGPT, "rejected": turn("function_call", "look()")},
        "field 'rejected[0].value': expected a call {'name': ..., 'arguments': ...} as JSON, or a "
        "list of them, got 'look()'",
    ),
    "broken tools": (
        SHAREGPT, {**SHAREGPT, "tools": "look"},
        "field 'tools': expected a list or a JSON string of one, got broken JSON",
    ),
    "broken system": (
        SHAREGPT, {**SHAREGPT, "system": 1}, "field 'system': expected text, got int 1",
    ),
    "no instruction": (
        ARGILLA, {**ARGILLA, "instruction": None}, "field 'instruction': expected text, got null",
    ),
    "instruction is no text": (
        ARGILLA, {**ARGILLA, "instruction": ["Sky?"]},
        "field 'instruction': expected text, got list ['Sky?']",
    ),
    "no chosen_response": (
        ARGILLA, {**ARGILLA, "chosen_response": None},
        "field 'chosen_response': expected text or messages, got null",
    ),
    "same response": (
        ARGILLA, {**ARGILLA, "rejected_response": "Blue."},
        "field 'rejected_response': expected another answer than 'chosen', got the same: list",
    ),
    "history": (
        {"instruction": "i", **SIDES}, {"instruction": "i", "history": [["a"]], **SIDES},
        "field 'history[0]': expected a question and its answer, got list ['a']",
    ),
    "other format": (
        SHAREGPT, ARGILLA, "field 'conversations': expected a list of messages, got only "
        "'instruction', 'chosen_response', 'rejected_response'",
    ),
    "UltraFeedback without a common turn": (
        {"prompt": "Sky?", **WHOLE},
        {"prompt": "Sky?", "chosen": [bot("a")], "rejected": [bot("b")]},
        "field 'prompt': expected a list of messages as in 'chosen', got 'Sky?'",
    ),
    "HH-RLHF without a rejected": (
        HH, {"chosen": HH["chosen"]},
        "field 'rejected': expected text or a list of messages, got only 'chosen'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_rows(tmp_path: Path, good: Any, bad: Any, message: str) -> None:
    path = write(tmp_path / "pairs.jsonl", good, bad, good)
    with pytest.raises(DataError, match="^" + re.escape(f"{path}:2: {message}")):
        load_pairs(path)
    loaded, report = read_pairs(path, on_bad_row="skip")
    assert (len(loaded), report.total_skipped) == (2, 1)


AMBIGUOUS = {
    "two conversations": (
        {**SHAREGPT, "messages": [user("Sky?")]}, "the prompt", "'conversations' and 'messages'",
        "prompt_column or messages_column",
    ),
    "conversation and question": (
        {**SHAREGPT, "question": "Sky?"}, "the prompt", "'conversations' and 'question'",
        "prompt_column or messages_column",
    ),
    "two texts": (
        {"question": "a", "input": "b", **SIDES}, "the prompt", "'question' and 'input'",
        "prompt_column or messages_column",
    ),
    "two pairs": (
        {**ARGILLA, **SIDES}, "the preferred answer", "'chosen' and 'chosen_response'",
        "chosen_column",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "what", "got", "option"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_ambiguous_columns(tmp_path: Path, record: Any, what: str, got: str, option: str) -> None:
    path = write(tmp_path / "pairs.jsonl", record)
    message = f"{path}: expected one column with {what}, got {got}; say which with {option}"
    # Not a matter of single rows.
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match="^" + re.escape(message) + "$"):
            load_pairs(path, on_bad_row=on_bad_row)


SAID = {
    "ShareGPT": (
        SHAREGPT, "'conversations' is read as the prompt, and 'chosen' and 'rejected' as its "
        "answers",
    ),
    "Alpaca": (
        {"instruction": "i", "input": "j", **SIDES}, "'instruction' and 'input' are read as the "
        "prompt, and 'chosen' and 'rejected' as its answers",
    ),
    "Orca": (
        {"system": "s", "question": "q", **SIDES}, "'question' and 'system' are read as the "
        "prompt, and 'chosen' and 'rejected' as its answers",
    ),
    "Alpaca with history": (
        {"instruction": "i", "input": "", "system": None, "history": [["a", "b"]], **SIDES},
        "'instruction', 'input' and 'history' are read as the prompt, and 'chosen' and "
        "'rejected' as its answers",
    ),
    "repeated": (
        {**HH, "question": "Sky?"},
        "'question' is not read, since 'chosen' and 'rejected' repeat the prompt",
    ),
    "renamed": (
        {"prompt": "a", "chosen_response": "b", "rejected_response": "c"},
        "'chosen_response' is read as 'chosen', 'rejected_response' is read as 'rejected'",
    ),
    "ours": ({"prompt": "a", "chosen": "b", "rejected": "c", "question": "d"}, None),
    "implicit": (HH, None),
}  # fmt: skip


@pytest.mark.parametrize(("record", "said"), SAID.values(), ids=SAID)
def test_what_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, record: Any, said: str | None
) -> None:
    path = write(tmp_path / "pairs.jsonl", record, record)
    with caplog.at_level(logging.INFO, "fastdaa"):
        load_pairs(path)
    assert caplog.messages == ([] if said is None else [f"{path}: {said}"])


def test_answers_that_begin_like_the_question_by_chance(tmp_path: Path) -> None:
    alike = {"question": "Sky", "chosen": "Sky is blue.", "rejected": "Sky is green."}
    (first, second) = load_pairs(
        write(tmp_path / "pairs.jsonl", alike, {"question": "Sky?", **SIDES})
    )
    assert fields(second) == SKY
    assert first["prompt"] == [user("Sky")] and first["chosen"] == [bot("Sky is blue.")]


def test_answers_in_json_stay_text(tmp_path: Path) -> None:
    record = {"question": "JSON?", "chosen": '{"a": 1}', "rejected": "{"}
    (pair,) = load_pairs(write(tmp_path / "pairs.jsonl", record))
    assert (pair["chosen"], pair["rejected"]) == ([bot('{"a": 1}')], [bot("{")])


def test_messages_in_json_are_read_out_of_it(tmp_path: Path) -> None:
    pair = {"prompt": ASK, "chosen": ANSWER, "rejected": [bot("Green.")]}
    record = {field: json.dumps(turns) for field, turns in pair.items()}
    for given in (record, {**record, "chosen": json.dumps(ANSWER, indent=1)}):
        (read,) = load_pairs(write(tmp_path / "pairs.jsonl", given))
        assert fields(read) == pair
    whole = {side: json.dumps(ASK + pair[side]) for side in ("chosen", "rejected")}
    (read,) = load_pairs(write(tmp_path / "pairs.jsonl", whole))
    assert fields(read) == pair
    (example,) = EXAMPLES.load(write(tmp_path / "e.jsonl", record))
    assert example == {"prompt": ASK, "completion": ANSWER}


def test_lists_of_other_objects_stay_text(tmp_path: Path) -> None:
    record = {"prompt": "JSON?", "chosen": '[{"a": 1}]', "rejected": '[{"role": 1'}
    (pair,) = load_pairs(write(tmp_path / "pairs.jsonl", record))
    assert fields(pair) == record


def test_messages_as_python_shows_them_are_an_error(tmp_path: Path) -> None:
    record = {"chosen": repr(ASK + ANSWER), "rejected": repr([*ASK, bot("Green.")])}
    with pytest.raises(DataError, match=r"field .chosen.: .* as Python shows it; write it with"):
        load_pairs(write(tmp_path / "pairs.jsonl", record))


def test_conversations_with_several_answers(tmp_path: Path, caplog: Any) -> None:
    long = [*ASK, *ANSWER, user("Sea?"), bot("Blue, too.")]
    path = write(tmp_path / "e.jsonl", {"messages": ASK + ANSWER}, *[{"messages": long}] * 2)
    assert EXAMPLES.load(path)[1] == {"prompt": long[:-1], "completion": long[-1:]}
    assert (
        caplog.text.count("hold several answers") == 1 and f"(the first: {path}:2)" in caplog.text
    )
    caplog.clear()
    PROMPTS.load(path)
    EXAMPLES.load(write(tmp_path / "p.jsonl", {"prompt": long[:-1], "completion": long[-1:]}))
    assert "several answers" not in caplog.text


def test_plain_text_of_a_named_column(tmp_path: Path) -> None:
    path = write(tmp_path / "e.jsonl", {"story": "Once.", "text": "no"})
    (example,) = EXAMPLES.load(path, columns=NamedColumns({"text": "story"}))
    assert example == {"prompt": "", "completion": "Once."}


def test_the_first_record_with_answers_decides(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [], {"id": 1}, ARGILLA, ARGILLA)
    loaded, report = read_pairs(path, on_bad_row="skip")
    assert [fields(row) for row in loaded] == [SKY, SKY]
    assert report.skipped == {"not an object": 1, "missing field": 1}


NAMED = {
    "text": (
        {"ask": "Sky:", "good": " blue", "bad": " red", "chosen": "not this"},
        {"prompt": "ask", "chosen": "good", "rejected": "bad"},
        {"prompt": "Sky:", "chosen": " blue", "rejected": " red"},
    ),
    "instruction as text": (
        ARGILLA, {"prompt": "instruction"},
        {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."},
    ),
    "swapped": (
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"chosen": "rejected", "rejected": "chosen"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
    ),
    "conversation": (
        {"dialog": [HUMAN], "question": "What?", "prompt": "x", **SIDES}, {"messages": "dialog"},
        SKY,
    ),
    "one of two": ({"question": "a", "input": "Sky:", **SIDES}, {"prompt": "input"},
                   {"prompt": "Sky:", **SIDES}),
    "scored": (
        {"prompt": "p", "answer": "a", "score": 1}, {"completion": "answer"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "columns", "expected"), NAMED.values(), ids=NAMED)
def test_named_columns(tmp_path: Path, record: Any, columns: Any, expected: Any) -> None:
    rows = [record]
    if "score" in record:
        rows.append({**record, "answer": "b", "score": 0})
    loaded = load_pairs(write(tmp_path / "pairs.jsonl", *rows), columns=columns)
    assert fields(loaded[0]) == expected
    assert not {*columns.values()} & {*loaded.column_names} - {"chosen", "rejected"}


def test_bad_rows_name_named_columns(tmp_path: Path) -> None:
    record = {"ask": [HUMAN], "good": GPT, "bad": turn("gpt", "Green.")}
    columns = {"messages": "ask", "chosen": "good", "rejected": "bad"}
    cases = [
        ({**record, "ask": [turn("alien", "?")]}, "'ask[0].from': expected one of human"),
        ({**record, "bad": 1}, "'bad': expected text or a list of messages, got int 1"),
        ({**record, "bad": GPT}, "'bad': expected another answer than 'chosen'"),
    ]
    for bad, message in cases:
        path = write(tmp_path / "pairs.jsonl", record, bad)
        with pytest.raises(DataError, match=re.escape(f"{path}:2: field {message}")):
            load_pairs(path, columns=columns)


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", ARGILLA)
    message = (
        f"{path}: prompt_column: expected a column 'instrction', got 'instruction', "
        "'chosen_response', 'rejected_response'"
    )
    with pytest.raises(DataError, match="^" + re.escape(message) + "$"):
        load_pairs(path, columns={"prompt": "instrction"})
    with pytest.raises(ValueError, match=r"columns: expected fields among prompt, .* got 'answer'"):
        NamedColumns({"answer": "x"})
    with pytest.raises(ValueError, match="columns: expected different columns, got"):
        NamedColumns({"chosen": "x", "rejected": "x"})


ASK, ANSWER = [user("Sky?")], [bot("Blue.")]
ANSWERED = {
    "ShareGPT": ({"conversations": [HUMAN, GPT]}, ASK, ANSWER),
    "ShareGPT, system column": (
        {"conversations": [HUMAN, GPT], "system": "s"}, [system("s"), *ASK], ANSWER
    ),
    "ShareGPT preferences": (SHAREGPT, ASK, ANSWER),
    "ShareGPT turns in messages": ({"messages": [HUMAN, GPT]}, ASK, ANSWER),
    "Argilla": (ARGILLA, ASK, ANSWER),
    "Alpaca": ({"instruction": "Sky?", "input": "", "output": "Blue."}, ASK, ANSWER),
    "Alpaca, input": (
        {"instruction": "A", "input": "B", "output": "Blue."}, [user("A\nB")], ANSWER
    ),
    "question and response": ({"question": "Sky?", "response": "Blue."}, ASK, ANSWER),
    "instruction and completion": ({"instruction": "Sky?", "completion": "Blue."}, ASK, ANSWER),
    "text first": ({"instruction": "A", "output": "B", "text": "all"}, "", "all"),
    "messages in JSON": ({"messages": json.dumps([*ASK, *ANSWER])}, ASK, ANSWER),
}  # fmt: skip


@pytest.mark.parametrize(("record", "prompt", "completion"), ANSWERED.values(), ids=ANSWERED)
def test_examples(tmp_path: Path, record: Any, prompt: Any, completion: Any) -> None:
    source = write(tmp_path / "examples.jsonl", record, record)
    assert EXAMPLES.load(source).to_list() == [{"prompt": prompt, "completion": completion}] * 2
    if "text" not in record:
        assert PROMPTS.load(source).to_list() == [{"prompt": prompt}] * 2


def test_prompts_need_no_answers(tmp_path: Path) -> None:
    for record in ({"instruction": "Sky?"}, {"conversations": [HUMAN]}):
        source = write(tmp_path / "prompts.jsonl", record)
        assert PROMPTS.load(source).to_list() == [{"prompt": ASK}]
        with pytest.raises(DataError):
            EXAMPLES.load(source)
    for empty in ("", []):
        source = write(tmp_path / "prompts.jsonl", {"prompt": empty})
        with pytest.raises(DataError, match=":1: field 'prompt': expected text or messages"):
            PROMPTS.load(source)


def test_examples_are_all_text_or_all_conversations(tmp_path: Path) -> None:
    chat, text = {"prompt": ASK, "completion": ANSWER}, {"prompt": "p", "completion": "c"}
    for rows, expected in (
        ((chat, text), "a list of messages as before, got text"),
        ((text, chat), "text as before, got a list of messages"),
    ):
        source = write(tmp_path / "examples.jsonl", *rows)
        with pytest.raises(DataError, match=f":2: field 'prompt': expected {expected}"):
            EXAMPLES.load(source)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [GPT, HUMAN]}, ":1: field 'conversations': expected a last message"),
        ({"conversations": [GPT]}, ":1: field 'conversations': expected a question and an answer"),
        ({"prompt": [], "completion": ANSWER}, ":1: field 'prompt': expected at least one message"),
        ({"instruction": "i", "output": ""}, ":1: field 'output': expected an answer with content"),
        ({"instruction": "i", "output": "a", "response": "b"},
         ": expected one column with the completion, got 'output' and 'response'; say which with "
         "completion_column"),
    ],
    ids=["question last", "no question", "empty prompt", "empty output", "two outputs"],
)  # fmt: skip
def test_broken_examples(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "examples.jsonl", record)
    with pytest.raises(DataError, match="^" + re.escape(f"{path}{message}")):
        EXAMPLES.load(path)


def test_skipped_examples_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "examples.jsonl", {"messages": [*ASK, *ANSWER]}, {"messages": ASK})
    with caplog.at_level(logging.WARNING, "fastdaa"):
        EXAMPLES.load(path, on_bad_row="skip")
    assert "1 example kept, 1 row left out: 1 wrong messages (first: " in caplog.text


def test_answers_that_are_json_stay_text():
    shown = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    other = [*shown[:1], {"role": "assistant", "content": "bah"}]
    pair = {"chosen": json.dumps(shown), "rejected": json.dumps(other)}
    # A conversation, and an answer that shows one.
    assert normalise_pair({**pair, "prompt": "hi"})["chosen"] == shown[1:]
    assert normalise_pair({**pair, "prompt": "Show a chat"}) == {"prompt": "Show a chat", **pair}
    for text in (
        '[{"role": "admin", "content": "x"}]', '[{"from": "USD", "value": 3}]',
        '[{"a": ' + "1" * 5000 + "}]", '[{"a": ' + "[" * 5000,
    ):  # fmt: skip
        row = {"prompt": "p", "chosen": text, "rejected": "no"}
        assert normalise_pair(row)["chosen"] == text
