"""Reading pairs: every format gives the same rows, and every error says where and what."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
from pathlib import Path

import pytest

from fastdaa.data import DataError, load_pairs, read_pairs

datasets = pytest.importorskip("datasets")

TEXT = [
    {
        "prompt": f"question {i}, «ü»",
        "chosen": f" good\n{i}",
        "rejected": f" bad, {i}",
        "score": i / 2,
    }
    for i in range(5)
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"question {i}"}],
        "chosen": [{"role": "assistant", "content": f"good {i}"}],
        "rejected": [{"role": "assistant", "content": f"bad {i}"}],
    }
    for i in range(5)
]


def write_lines(path: Path, rows: list) -> Path:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_array(path: Path, rows: list) -> Path:
    data = json.dumps(rows, indent=1).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_object(path: Path, rows: list) -> Path:
    path.write_text(json.dumps({"version": 1, "data": rows}))
    return path


def write_parquet(path: Path, rows: list) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def write_csv(path: Path, rows: list) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
            )
    return path


def write_saved(path: Path, rows: list) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def write_folder(path: Path, rows: list) -> Path:
    path.mkdir()
    write_lines(path / "part-0.jsonl", rows[:2])
    write_parquet(path / "part-1.parquet", rows[2:])
    (path / "README.md").write_text("not data")
    return path


@pytest.mark.parametrize("rows", [TEXT, CHATS], ids=["text", "chats"])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("pairs.jsonl", write_lines),
        ("pairs.jsonl.gz", write_lines),
        ("pairs.ndjson", write_lines),
        ("lines.json", write_lines),
        ("pairs.json", write_array),
        ("pairs.json.gz", write_array),
        ("object.json", write_object),
        ("pairs.parquet", write_parquet),
        ("pairs.csv", write_csv),
        ("saved", write_saved),
        ("folder", write_folder),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, write, rows: list) -> None:
    path = write(tmp_path / name, rows)
    before = sorted(tmp_path.rglob("*"))
    loaded, report = read_pairs(path)
    fields = ("prompt", "chosen", "rejected")
    found = [{field: row[field] for field in fields} for row in loaded]
    assert found == [{field: row[field] for field in fields} for row in rows]
    assert (report.kept, report.total_skipped) == (5, 0)
    assert sorted(tmp_path.rglob("*")) == before, "reading leaves no files behind"
    assert list(load_pairs(str(path), limit=2)["prompt"]) == [row["prompt"] for row in rows[:2]]


def test_a_dataset_in_memory_is_a_source() -> None:
    assert load_pairs(datasets.Dataset.from_list(TEXT))["chosen"] == [r["chosen"] for r in TEXT]


def test_plain_columns_pass_and_others_are_left_out(tmp_path: Path) -> None:
    rows = [{**row, "source": "web", "tags": ["a"], "n": None, "odd": i % 2 or "x"}
            for i, row in enumerate(TEXT)]  # fmt: skip
    rows[1]["source"] = None
    loaded = load_pairs(write_lines(tmp_path / "pairs.jsonl", rows))
    assert set(loaded.column_names) == {"prompt", "chosen", "rejected", "score", "source"}
    assert loaded["score"] == [row["score"] for row in TEXT]
    assert loaded["source"] == ["web", None, "web", "web", "web"]


def test_tool_calls_and_tools_keep_their_shape(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": {"x": 1}}}
    other = {"function": {"name": "say", "arguments": {"text": "hi", "loud": True}}}
    rows = [
        {
            "prompt": [{"role": "user", "content": "?"}],
            "chosen": [{"role": "assistant", "tool_calls": [used]}],
            "rejected": [{"role": "assistant", "content": "no"}],
            "tools": [{"name": used["function"]["name"]}],
            "chat_template_kwargs": {"thinking": used is call},
        }
        for used in (call, other)
    ]
    loaded = load_pairs(write_lines(tmp_path / "pairs.jsonl", rows))
    for row, used in zip(loaded, (call, other), strict=True):
        assert row["chosen"] == [{"role": "assistant", "tool_calls": [used]}]
        assert json.loads(row["tools"]) == [{"name": used["function"]["name"]}]
        assert row["chat_template_kwargs"] == {"thinking": used is call}


GOOD = json.dumps(TEXT[0]).encode()
CHAT = json.dumps(CHATS[0]).encode()
IMPLICIT = b'{"chosen": "x a", "rejected": "x b"}'


def test_answers_under_other_names(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"q": "p", "win": "a", "lose": "b"}')
    said = "got only 'q', 'win', 'lose'; chosen_column and rejected_column say which columns hold "
    with pytest.raises(DataError, match=said + "the answers"):
        load_pairs(path)


def test_the_split_that_is_taken_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(GOOD)
    with caplog.at_level(logging.INFO, "fastdaa"):
        load_pairs(tmp_path)
    assert caplog.messages == [f"{tmp_path}: split train is taken, of test, train"]
    caplog.clear()
    with caplog.at_level(logging.INFO, "fastdaa"):
        load_pairs(f"{tmp_path}::test")
        load_pairs(tmp_path / "test.jsonl", split="test")
    assert not caplog.messages


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"prompt": "\xff\xfe"}', "broken UTF-8",
         "expected UTF-8 text, got the byte 0xff at byte 13 of the line"),
        (b'{"prompt": "p", "chosen" "a"}', "broken JSON",
         "expected one JSON object a line, got broken JSON (Expecting ':' delimiter at column 26)"),
        (rb'{"prompt": "p", "chosen": "a \ud83d", "rejected": "b"}', "broken Unicode",
         r"expected text that can be written as UTF-8, got half of a character, '\ud83d'"),
        (b'["a", "b"]', "not an object", "expected an object with fields, got list ['a', 'b']"),
        (b'{"prompt": "p", "chosen": "a"}', "missing field",
         "field 'rejected': expected text or a list of messages, got only 'prompt', 'chosen'"),
        (b'{"prompt": "p", "chosen": 1, "rejected": "b"}', "neither text nor messages",
         "field 'chosen': expected text or a list of messages, got int 1"),
        (b'{"prompt": "p", "chosen": "a", "rejected": ""}', "empty completion",
         "field 'rejected': expected an answer with content, got an empty one"),
        (b'{"prompt": "p", "chosen": "a", "rejected": "a"}', "chosen equals rejected",
         "field 'rejected': expected another answer than 'chosen', got the same: 'a'"),
        (CHAT, "mixed formats",
         "field 'chosen': expected text as in the first row, got a list of messages"),
        (IMPLICIT, "mixed formats",
         "field 'prompt': expected a prompt as in the first row, got none"),
    ],
    ids=["utf-8", "json", "half an emoji", "non-object", "missing", "non-string", "empty",
         "equal", "mixed", "implicit among explicit"],
)  # fmt: skip
def test_bad_lines(tmp_path: Path, line: bytes, reason: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n" + line + b"\n")
    expected = f"{path}:3: {message} (on_bad_row='skip' leaves such rows out and counts them)"
    with pytest.raises(DataError, match="^" + re.escape(expected) + "$"):
        load_pairs(path)
    loaded, report = read_pairs(path, on_bad_row="skip")
    assert len(loaded) == report.kept == 2
    assert report.skipped == {reason: 2}
    assert report.first[reason] == f"{path}:3: {message}"
    assert str(report).startswith("2 pairs kept, 2 rows left out: 2 " + reason)
    assert "\n" not in str(report)


@pytest.mark.parametrize("begin", [b"[", b'{"data": ['], ids=["list", "object"])
def test_halves_of_characters_in_a_list(tmp_path: Path, begin: bytes) -> None:
    path = tmp_path / "pairs.json"
    whole = rb'{"prompt": "p", "chosen": "\ud83d\ude00", "rejected": "b"}'
    half = whole.replace(rb"\ude00", b"")
    path.write_bytes(begin + whole + b"," + half + b"]" + b"}" * begin.count(b"{"))
    loaded, report = read_pairs(path, on_bad_row="skip")
    assert loaded["chosen"] == ["\N{GRINNING FACE}"]
    assert report.skipped == {"broken Unicode": 1}


def test_skipped_rows_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD + b"\n{\n")
    with caplog.at_level(logging.WARNING, "fastdaa"):
        load_pairs(path, on_bad_row="skip")
    assert "1 pair kept, 1 row left out: 1 broken JSON" in caplog.text


def test_each_of_several_reasons_has_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    empty = b'{"prompt": "p", "chosen": "a", "rejected": ""}'
    path.write_bytes(b"\n".join((GOOD, b"[]", empty, b"[]")))
    first, *examples = str(read_pairs(path, on_bad_row="skip")[1]).splitlines()
    assert first == "1 pair kept, 3 rows left out: 2 not an object, 1 empty completion"
    assert [line.split(": ")[:2] for line in examples] == [
        ["  not an object", f"{path}:2"],
        ["  empty completion", f"{path}:3"],
    ]
    path.write_bytes(b"[]\n" + empty)
    with pytest.raises(DataError, match=r"got none \(0 pairs kept, 2 rows left out: [^\n]*\)$"):
        load_pairs(path, on_bad_row="skip")


def test_rows_behind_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD + b"\nbroken\n")
    assert len(load_pairs(path, limit=2)) == 2
    with pytest.raises(DataError, match=":3:"):
        load_pairs(path, limit=3)


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n  \n\n" + GOOD)
    assert len(load_pairs(path)) == 2
    array = tmp_path / "pairs.json"
    array.write_bytes(b"\xef\xbb\xbf [\n" + GOOD + b"]")
    assert len(load_pairs(array)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[\n{"prompt": "p",\n "chosen": "a", "rejected": "b"},\n\n{"prompt": 1}]',
         ":5: field 'chosen': expected text or a list of messages, got only 'prompt'"),
        ("b.json", b'[\n{"prompt": "p", "chosen": "a", "rejected": "b"}\n{}]',
         ":3: expected a JSON list of objects, got broken JSON (Expecting ',' or ']' at column 1)"),
        ("c.json", b'[\n{"prompt": "\xff"}]', ":2: expected UTF-8 text, got the byte 0xff"),
        ("d.json", b'{"rows": 3,\n "x": []}',
         ": expected a list of objects, an object with such a list under 'data', or an object a "
         "line, got dict {'rows': 3, 'x': []}"),
        ("e.json", b'{"data": [{"prompt": "p"}]}',
         ": row 1: field 'chosen': expected text or a list of messages, got only 'prompt'"),
        ("f.json", b'"text"', ": expected a list of objects, an object"),
        ("f2.json", b'[{"prompt": "p", "chosen": "a", "rejected": "b"}',
         ":1: expected a JSON list of objects, got broken JSON"),
        ("g.csv", b"prompt,chosen,rejected\np,a,b\np,a\n",
         ":3: expected 3 cells as in the header, got 2"),
        ("h.csv", b"prompt,chosen\np,a\n",
         ":2: field 'rejected': expected text or a list of messages, got only 'prompt', 'chosen'"),
        ("i.csv", b'prompt,chosen,rejected\np,"a\n\n",b\np,\xff,b\n',
         ":5: expected UTF-8 text, got the byte 0xff at byte 3 of the line"),
        ("j.csv", b"prompt,chosen,rejected\n[{'role': 'user'}],a,b\n",
         ":2: field 'prompt': expected text or a JSON list of messages, got broken JSON"),
        ("k.csv", b'prompt,chosen,rejected\np,"a"x,b\n', ":2: expected CSV with a header line"),
        ("l.parquet", b"no parquet", ": expected a Parquet file, got "),
        ("m.jsonl.gz", gzip.compress(GOOD * 9)[:-12], ": expected a whole gzip file, got a broken"),
        ("n.json.gz", b"plain", ": expected a whole gzip file, got a broken one"),
        ("o.txt", b"text",
         ": expected a file that ends with one of .jsonl, .ndjson, .json, .csv, .parquet (or .gz)"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match="^" + re.escape(f"{path}{message}")):
        load_pairs(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\n"),
        ("b.json", b"[]"),
        ("c.json", b""),
        ("d.csv", b"prompt,chosen,rejected\n"),
    ],
)
def test_empty_files(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"expected at least one pair, got none$"):
        load_pairs(path)


def test_only_bad_rows_is_an_empty_dataset(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"{}\n{}\n")
    with pytest.raises(DataError, match=r"at least one pair, got none \(0 pairs kept, 2 rows"):
        load_pairs(path, on_bad_row="skip")


def test_bad_parquet_rows_are_numbered(tmp_path: Path) -> None:
    rows = [TEXT[0], {**TEXT[1], "rejected": None}]
    path = write_parquet(tmp_path / "pairs.parquet", rows)
    with pytest.raises(DataError, match=r"pairs.parquet: row 2: field 'rejected': .* got null"):
        load_pairs(path)


def test_splits_of_a_saved_dataset(tmp_path: Path) -> None:
    parts = {
        "train": datasets.Dataset.from_list(TEXT[:3]),
        "test": datasets.Dataset.from_list(TEXT),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert len(load_pairs(tmp_path / "saved")) == 3
    assert len(load_pairs(tmp_path / "saved", split="test")) == 5
    with pytest.raises(DataError, match="split: expected one of train, test, got 'dev'"):
        load_pairs(tmp_path / "saved", split="dev")


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "train-0.jsonl", TEXT[:2])
    write_lines(tmp_path / "train-1.jsonl", TEXT[2:])
    (tmp_path / "test").mkdir()
    write_lines(tmp_path / "test" / "0.jsonl", TEXT[:1])
    assert len(load_pairs(tmp_path)) == 5
    assert len(load_pairs(tmp_path, split="test")) == 1
    with pytest.raises(DataError, match="split: expected one of test, train, got 'validation'"):
        load_pairs(tmp_path, split="validation")


CARD = """---
license: mit
configs:
- config_name: {0}
  data_files:
  - split: train_prefs
    path: data/train_prefs-*
  - split: train_sft
    path: data/train_sft-*
- config_name: other
  data_files: other.jsonl
---
"""


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """A dataset of the hub as ``hf download`` leaves it, with names of splits of its own."""
    folder = tmp_path / "ultra"
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train_prefs", CHATS[:3]), ("train_sft", CHATS[3:])):
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    write_lines(folder / "other.jsonl", CHATS[:1])
    return folder


def test_splits_of_shards_have_their_whole_name(download: Path) -> None:
    data = download / "data"
    assert load_pairs(data, split="train_prefs")["prompt"] == [r["prompt"] for r in CHATS[:3]]
    with pytest.raises(DataError, match="one of train_prefs, train_sft, got no split given"):
        load_pairs(data)


def test_a_dataset_card_says_what_is_in_a_folder(download: Path) -> None:
    (download / "README.md").write_text(CARD.format("default"))
    assert len(load_pairs(download, split="train_sft")) == 2
    assert len(load_pairs(f"{download}:other")) == len(load_pairs(f"{download}:other:train")) == 1
    with pytest.raises(DataError, match="one of train_prefs, train_sft, got no split given"):
        load_pairs(download)
    (download / "README.md").write_text(CARD.format("prefs"))
    with pytest.raises(DataError, match=r"README.md says, got .*configs: \['prefs', 'other'\]"):
        load_pairs(download)
    assert len(load_pairs(download, name="prefs", split="train_prefs")) == 3


def test_several_splits_and_no_train_must_be_chosen(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", TEXT)
    write_lines(tmp_path / "dev.jsonl", TEXT)
    with pytest.raises(DataError, match="split: expected one of dev, test, got no split given"):
        load_pairs(tmp_path)


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"expected files that end with .* found none"):
        load_pairs(tmp_path)


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "data/missing.jsonl", "/no/such/folder", "word", "./a/b"]
)
def test_a_path_that_does_not_exist(name: str) -> None:
    message = "expected a file, a folder, or a hub id 'owner/name'; there is no such file or folder"
    with pytest.raises(DataError, match=re.escape(f"{name}: {message}")):
        load_pairs(name)


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path, name=None):
        asked.append((path, name))
        return datasets.DatasetDict(train_prefs=datasets.Dataset.from_list(TEXT))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_pairs("owner/pairs", name="small")) == 5
    assert asked == [("owner/pairs", "small")]
    with pytest.raises(DataError, match="owner/pairs: split: expected one of train_prefs, got 'x'"):
        load_pairs("owner/pairs", split="x")


@pytest.mark.parametrize(
    ("error", "said"),
    [(ConnectionError("no route\nto the hub"), "ConnectionError: no route"),
     (TimeoutError(), "TimeoutError: no message")],
    ids=["several lines", "no message"],
)  # fmt: skip
def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def load_dataset(path, name=None):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        "owner/missing: expected a local path or a hub dataset that can be reached; there is no "
        f"such path, and loading it from the hub failed: {said}"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        load_pairs("owner/missing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_bad_row": "warn"}, "on_bad_row: expected one of 'error', 'skip', got 'warn'"),
        ({"limit": 0}, "limit: expected a finite number above 0, got 0"),
    ],
    ids=["on_bad_row", "limit"],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pairs("x", **arguments)
