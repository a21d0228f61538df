"""Unpaired preferences: forms, labels, errors, tokens, batches."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from datasets import Dataset
from word_files import word_tokenizer

from fastdaa.data import DataError, load_mixture, load_unpaired, tokenize_pairs, tokenize_unpaired
from fastdaa.data.rows import UnpairedRows
from fastdaa.data.unpaired import UNPAIRED, is_unpaired, read_label
from fastdaa.data.unpaired_collate import UnpairedCollator
from fastdaa.data.validate import BadRow

CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
GOOD = {"prompt": "w1 w2", "completion": " w3", "label": True}
BAD = {"prompt": "w1 w4", "completion": " w5 w6", "label": False}
ASK, ANSWER = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_text(tmp_path):
    source = write(tmp_path / "rows.jsonl", [GOOD, {**BAD, "user": "someone"}])
    read = load_unpaired(source)
    assert read.to_list() == [{**GOOD, "user": None}, {**BAD, "user": "someone"}]
    assert load_unpaired(Dataset.from_list([GOOD, BAD])).to_list() == [GOOD, BAD]


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"prompt": [ASK], "completion": [ANSWER]}, {}),
        ({"prompt": [ASK], "completion": ANSWER}, {}),
        ({"messages": [ASK, ANSWER]}, {}),
        ({"instruction": "w1", "output": "w2"}, {}),
        ({"question": "w1", "response": "w2"}, {}),
        ({"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]}, {}),
        ({"dialog": [ASK, ANSWER]}, {"messages": "dialog"}),
    ],
    ids=["turns", "one message", "messages", "alpaca", "question", "sharegpt", "named"],
)
def test_conversations(record, columns):
    records = [{**record, "thumbs_up": 1}, {**record, "thumbs_up": 0}]
    read = load_unpaired(Dataset.from_list(records), columns={**columns, "label": "thumbs_up"})
    assert read.to_list() == [
        {"prompt": [ASK], "completion": [ANSWER], "label": label} for label in (True, False)
    ]


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0.0, False),
        ("true", True),
        ("FALSE ", False),
        ("1.0", True),
    ],
)
def test_labels(value, label):
    assert read_label(value) is label


@pytest.mark.parametrize("value", ["maybe", "", 2, -1, 0.5, [True], float("nan")])
def test_no_labels(value):
    with pytest.raises(BadRow, match="field 'label': expected true or false, got"):
        read_label(value)


def test_csv(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion,label\nw1,w2,True\nw1,w3,0\n")
    assert load_unpaired(tmp_path / "rows.csv")["label"] == [True, False]


ERRORS = {
    "no label": ({"prompt": "w1", "completion": "w2"}, "'label': expected true or false beside"),
    "null": ({**GOOD, "label": None}, "'label': expected true or false, got null"),
    "word": ({**GOOD, "label": "good"}, "'label': expected true or false, got 'good'"),
    "pair": ({"prompt": "w1", "chosen": "w2", "rejected": "w3"}, "got a preference pair"),
    "pair and label": ({"prompt": "w1", "chosen": "w2", "label": True}, "got a preference pair"),
    "no prompt": ({"completion": "w2", "label": True}, "'prompt': expected text or messages"),
    "empty": ({**GOOD, "completion": ""}, "'completion': expected text, got an empty one"),
    "other form": ({**GOOD, "prompt": [ASK], "completion": [ANSWER]}, "expected text as before"),
    "only a side": (
        {"prompt": [ASK], "completion": [ASK], "label": True}, "a last message from 'assistant'"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_rows(tmp_path, record, message):
    source = write(tmp_path / "rows.jsonl", [BAD, record, GOOD])
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{message}"):
        load_unpaired(source)
    assert load_unpaired(source, on_bad_row="skip").to_list() == [BAD, GOOD]


def test_nothing_left(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"prompt": "w1", "completion": "w2"}])
    with pytest.raises(DataError, match=r"expected at least one example, got none.*missing label"):
        load_unpaired(source, on_bad_row="skip")


def test_a_label_column_has_another_name_in_messages():
    rows = Dataset.from_list([{"prompt": "w1", "completion": "w2", "liked": "perhaps"}])
    with pytest.raises(DataError, match="field 'liked': expected true or false"):
        load_unpaired(rows, columns={"label": "liked"})
    with pytest.raises(DataError, match="label_column: expected a column 'thumb'"):
        load_unpaired(rows, columns={"label": "thumb"})


@pytest.mark.parametrize(
    ("record", "columns", "unpaired"),
    [
        (GOOD, {}, True),
        ({"prompt": "w1", "completion": "w2"}, {}, True),
        ({"prompt": "w1", "completion": "w2", "score": 1.0}, {}, False),
        ({**GOOD, "score": 1.0}, {}, True),
        ({"prompt": "w1", "chosen": "w2", "rejected": "w3", "label": 1}, {}, False),
        ({"text": "w1", "a": "w2", "b": "w3"}, {"chosen": "a", "rejected": "b"}, False),
        ({"text": "w1", "a": "w2", "liked": 1}, {"completion": "a", "label": "liked"}, True),
    ],
)
def test_is_unpaired(record, columns, unpaired):
    assert is_unpaired(record, columns) is unpaired


def test_mixture():
    sources = [Dataset.from_list([GOOD, BAD]), Dataset.from_list([{**BAD, "label": 0}] * 4)]
    mixed = load_mixture(sources, weights=[2, 0.5], kind=UNPAIRED).train
    assert sorted(mixed["label"]) == [False] * 4 + [True] * 2


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_tokens_are_those_of_pairs(mode, chat):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    rows = [GOOD, {**BAD, "prompt": "w1 w2 w3 w4 w5 w6"}, {**GOOD, "completion": " w7 w8 w9 w1"}]
    if chat:
        rows = [
            {
                **row,
                "prompt": [{**ASK, "content": row["prompt"]}],
                "completion": [{**ANSWER, "content": row["completion"]}],
            }
            for row in rows
        ]
    other = [{**ANSWER, "content": "w9"}] if chat else " w9"
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other} for row in rows
    ]
    options = {"max_length": 8, "truncation_mode": mode}
    got, report = tokenize_unpaired(Dataset.from_list(rows), tokenizer, **options)
    expected, _ = tokenize_pairs(Dataset.from_list(pairs), tokenizer, **options)
    assert report.kept == len(expected) > 0 and report.unit == "example"
    assert got.column_names == ["prompt_ids", "completion_ids", "label"]
    for row, pair in zip(got, expected, strict=True):
        prompt = pair["prompt_ids"][pair.get("chosen_skip", 0) :]
        assert (row["prompt_ids"], row["completion_ids"]) == (prompt, pair["chosen_ids"])
    if len(got) == 3:
        assert got["label"] == [True, False, True]


def test_labels_stay_with_their_rows_where_some_are_left_out():
    rows = [GOOD, {**BAD, "prompt": " ".join(["w1"] * 20)}, {**GOOD, "completion": " w8"}, BAD]
    got, report = tokenize_unpaired(Dataset.from_list(rows), word_tokenizer(), max_length=9)
    assert got["label"] == [True, True, False] and sum(report.dropped.values()) == 1


ROWS = [
    {"row_id": 7, "prompt_ids": [1, 2], "completion_ids": [3, 4, 5], "label": True},
    {"row_id": 8, "prompt_ids": [6], "completion_ids": [7], "label": False},
    {"row_id": 9, "prompt_ids": [8, 9, 10], "completion_ids": [11, 12], "label": True},
]


def sequences(pack):
    ends = pack["segments"]["cu_q"].tolist()
    ids = pack["input_ids"][0].tolist()
    return [ids[a:b] for a, b in itertools.pairwise(ends)]


def test_a_batch():
    batch = UnpairedCollator("packed", mismatched=True)(ROWS)
    (pack,), (crossed,) = batch["packs"], batch["kl_packs"]
    assert batch["row_ids"].tolist() == [7, 8, 9] and batch["mismatched"] == 3
    assert sequences(pack) == [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 12]]
    assert pack["desirable"] == pack["labels"].tolist() == [True, False, True]
    assert pack["labels"].dtype == torch.bool
    assert sequences(crossed) == [[1, 2, 11, 12], [6, 3, 4, 5], [8, 9, 10, 7]]
    assert crossed["counts"] == [2, 3, 1]
    assert "kl_packs" not in UnpairedCollator("packed")(ROWS)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("keep_start", [[1, 2, 11], [6, 3, 4], [8, 9, 7]]),
        ("keep_end", [[2, 11, 12], [3, 4, 5], [8, 9, 7]]),
    ],
)
def test_mismatched_sequences_are_cut(mode, expected):
    rows = [*ROWS[:2], {**ROWS[2], "prompt_ids": [8, 9]}]
    collate = UnpairedCollator("packed", mismatched=True, max_length=3, truncation_mode=mode)
    (crossed,) = collate(rows)["kl_packs"]
    assert sequences(crossed) == expected


def test_one_row_has_no_mismatched_completion():
    batch = UnpairedCollator("padded", 0, mismatched=True)(ROWS[:1])
    # Every process has a forward pass, which may be a collective.
    assert batch["mismatched"] == 0 and len(batch["kl_packs"]) == 1


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_packs_know_their_labels(layout):
    batch = UnpairedCollator(layout, 0, tokens_per_pack=7, mismatched=True)(ROWS)
    assert len(batch["packs"]) > 1
    for pack in batch["packs"]:
        rows = [ROWS[index] for index in pack["members"]]
        assert pack["desirable"] == [row["label"] for row in rows]
        assert pack["counts"] == [len(row["completion_ids"]) for row in rows]
    assert sum(len(pack["counts"]) for pack in batch["kl_packs"]) == 3


def test_layouts_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"layout: expected .*packed.*got 'prefix_shared'"):
        UnpairedCollator("prefix_shared")


def test_rows_need_labels():
    data = Dataset.from_list([{"prompt_ids": [1], "completion_ids": [2], "label": True}])
    assert UnpairedRows(data)[0]["label"] is True
    with pytest.raises(ValueError, match="expected a column 'label'"):
        UnpairedRows(data.remove_columns("label"))
