"""Several sources as one dataset: what is drawn, what is said, and which row a message names."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastdaa.data import DataError, PairRows, load_mixture, load_pairs, tokenize_pairs
from fastdaa.data.errors import BadRow
from fastdaa.data.examples import EXAMPLES, PROMPTS
from fastdaa.data.sampling import choose_rows
from fastdaa.data.sources import Source, parse_source, without_split

datasets = pytest.importorskip("datasets")


def pairs(letter: str, count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{letter}{i}", "chosen": " yes", "rejected": " no", **more}
        for i in range(count)
    ]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / "a.jsonl", pairs("a", 12)),
        write(tmp_path / "b.jsonl", pairs("b", 8)),
    ]


def prompts(dataset: Any) -> list[str]:
    return list(dataset["prompt"])


def as_lists(chosen: Any) -> list[list[list[int]]]:
    return [[rows.tolist() for rows in part] for part in chosen]


def test_without_weights_all_rows_are_there_once_in_their_order(files: list[Path]) -> None:
    train, held_out, report = load_mixture(files)
    assert prompts(train) == [f"a{i}" for i in range(12)] + [f"b{i}" for i in range(8)]
    assert held_out is None
    assert train[13]["mixture_source"] == str(files[1])
    assert train[13]["mixture_place"] == f"{files[1]}:2"
    assert str(report) == (
        f"20 pairs of 2 sources\n{files[0]}: 12 from 12 pairs\n{files[1]}: 8 from 8 pairs"
    )


def test_weights() -> None:
    ((whole, quarter, more), _) = choose_rows([7, 40, 10], [1, 0.25, 2.5], seed=0)
    assert whole.tolist() == list(range(7))
    assert len(quarter) == len({*quarter.tolist()}) == 10
    counts = Counter(more.tolist())
    assert sorted(counts.values()) == [2] * 5 + [3] * 5


def test_what_is_drawn_depends_on_the_seed_and_the_place_alone() -> None:
    first = as_lists(choose_rows([40, 40], [0.5, 0.5], seed=1))
    assert first == as_lists(choose_rows([40, 40], [0.5, 0.5], seed=1))
    assert first[0][0] != first[0][1], "every source has numbers of its own"
    assert first != as_lists(choose_rows([40, 40], [0.5, 0.5], seed=2))
    longer = as_lists(choose_rows([40, 40, 9], [0.5, 0.5, 1], seed=1))
    assert first[0] == longer[0][:2]


@pytest.mark.parametrize(
    ("sizes", "weights", "test_size", "held"),
    [
        ([30, 20], [1, 1], 0.1, [3, 2]),
        ([30, 20], [1, 1], 5, [3, 2]),
        # A quarter of the 80 counts for the evaluation, too.
        ([30, 80], [1, 0.25], 0.1, [3, 2]),
        # Repeated rows do not.
        ([30, 20], [1, 3], 10, [6, 4]),
        # 4 rows at 7 : 7 : 6 are 1.4, 1.4, 1.2: the first has the largest remainder.
        ([7, 7, 6], [1, 1, 1], 4, [2, 1, 1]),
        ([3, 97], [1, 1], 0.015, [0, 2]),
    ],
    ids=["share", "number", "part of a source", "repeated", "remainders", "a small source"],
)
def test_held_out_rows(sizes: Any, weights: Any, test_size: float, held: list[int]) -> None:
    train, held_out = choose_rows(sizes, weights, seed=3, test_size=test_size)
    assert [len(rows) for rows in held_out] == held
    for size, weight, learnt, kept in zip(sizes, weights, train, held_out, strict=True):
        assert not {*learnt.tolist()} & {*kept.tolist()}
        assert len({*kept.tolist()}) == len(kept)
        assert len(learnt) == int(weight * (size - len(kept)) + 0.5)


def test_the_limit_is_a_random_choice_of_all() -> None:
    whole = as_lists(choose_rows([300, 100], [1, 2], seed=0))[0]
    limited = as_lists(choose_rows([300, 100], [1, 2], seed=0, limit=50))[0]
    assert sum(map(len, limited)) == 50
    # 30 and 20 are expected, with a deviation of 3.2.
    assert 20 < len(limited[0]) < 40
    for part, everything in zip(limited, whole, strict=True):
        assert not Counter(part) - Counter(everything)
    assert as_lists(choose_rows([3, 2], [1, 1], seed=0, limit=9))[0] == [[0, 1, 2], [0, 1]]


def test_a_mixture_with_all_of_it(files: list[Path]) -> None:
    options: dict[str, Any] = {"weights": [0.5, 2], "seed": 4, "test_size": 4}
    train, held_out, report = load_mixture(files, **options)
    assert held_out is not None and len(held_out) == 4
    # 6 and 8 rows count, so 1.7 and 2.3 of 4 are held out.
    assert Counter(name[0] for name in prompts(held_out)) == {"a": 2, "b": 2}
    assert Counter(name[0] for name in prompts(train)) == {"a": 5, "b": 12}
    assert not {*prompts(train)} & {*prompts(held_out)}
    assert str(report) == (
        f"17 pairs of 2 sources, 4 held out\n{files[0]}: 5 from 12 pairs, weight 0.5, 2 held out\n"
        f"{files[1]}: 12 from 8 pairs, weight 2, 2 held out"
    )
    again = load_mixture(files, **options)
    assert prompts(again.train) == prompts(train)
    other = load_mixture(files, **{**options, "seed": 5})
    assert prompts(other.train) != prompts(train)


def test_formats_are_mixed_and_their_fields_joined(tmp_path: Path) -> None:
    chat = {
        "conversations": [{"from": "human", "value": "c"}], "chosen": "yes", "rejected": "no",
        "tools": '[{"name": "f"}]', "score": 1,
    }  # fmt: skip
    argilla = {"instruction": "d", "chosen_response": "yes", "rejected_response": "no", "id": "x"}
    sources = [
        write(tmp_path / "chats.jsonl", [chat]), write(tmp_path / "argilla.jsonl", [argilla])
    ]  # fmt: skip
    mixed = load_mixture(sources).train.to_list()
    sides = {
        side: [{"role": "assistant", "content": text}]
        for side, text in (("chosen", "yes"), ("rejected", "no"))
    }
    assert mixed == [
        {
            "prompt": [{"role": "user", "content": "c"}], **sides, "tools": chat["tools"],
            "score": 1, "id": None,
            "mixture_source": str(sources[0]), "mixture_place": f"{sources[0]}:1",
        },
        {
            "prompt": [{"role": "user", "content": "d"}], **sides, "tools": None, "score": None,
            "id": "x", "mixture_source": str(sources[1]), "mixture_place": f"{sources[1]}:1",
        },
    ]  # fmt: skip


def test_other_kinds_and_sources_in_memory(files: list[Path]) -> None:
    given = datasets.Dataset.from_list([{"prompt": "x", "completion": " y"}])
    mixed = load_mixture([files[0], given], kind=EXAMPLES).train
    assert (len(mixed), mixed[12]["completion"]) == (13, " y")
    assert mixed[12]["mixture_place"] == "dataset: row 1"
    assert mixed[12]["mixture_source"] == "dataset 2"
    only = load_mixture([files[0], given], kind=PROMPTS, weights=[0.25, 1]).train
    assert len(only) == 4 and "completion" not in only.column_names


def test_a_bad_row_names_its_source(files: list[Path], tmp_path: Path) -> None:
    bad = write(tmp_path / "c.jsonl", [*pairs("c", 2), {"prompt": "c"}])
    with pytest.raises(DataError, match=re.escape(f"{bad}:3: field 'chosen': expected")):
        load_mixture([*files, bad])
    report = load_mixture([*files, bad], on_bad_row="skip").report
    said = f"{bad}: 2 from 2 pairs; 1 row left out: 1 missing field (first: {bad}:3: field"
    assert str(report).splitlines()[-1].startswith(said)


def test_splits_of_single_sources(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        write(tmp_path / "folder" / f"{split}.jsonl", pairs(split, count))
    alone = write(tmp_path / "a.jsonl", pairs("a", 1))
    assert len(load_mixture([f"{tmp_path / 'folder'}::test", alone]).train) == 3
    folder = str(tmp_path / "folder")
    assert len(load_mixture([f"{folder}::test", folder], split="train").train) == 5


WRONG = {
    "none": ([], {}, "dataset: expected a list of sources, got []"),
    "text": ("ab", {}, "dataset: expected a list of sources, got 'ab'"),
    "twice": (["a", "b", "a"], {}, "dataset: expected every source once, got a again; a weight of"),
    "too few weights": (["a", "b"], {"weights": [1]}, "one a dataset, 2 of them, got 1"),
    "no weight": (["a", "b"], {"weights": [1, 0]}, "dataset_weights: expected a finite number abo"),
    "infinite": (["a"], {"weights": [float("inf")]}, "dataset_weights: expected a finite number"),
    "no limit": (["a"], {"limit": 0}, "limit: expected a finite number above 0, got 0"),
    "no test": (["a"], {"test_size": 0}, "test_size: expected a finite number above 0, got 0"),
}


@pytest.mark.parametrize(("sources", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(sources: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_mixture(sources, **options)


def test_nothing_left_to_train_on(files: list[Path]) -> None:
    message = (
        f"dataset_weights: expected at least one pair of {files[1]} to train on, got none: it has "
        "8, of which 0 are held out, and weight 0.01"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_mixture(files, weights=[1, 0.01])
    with pytest.raises(ValueError, match=r"test_size: expected fewer than all rows \(20\), got 20"):
        load_mixture(files, test_size=20)


def test_text_and_conversations_are_not_mixed(files: list[Path], tmp_path: Path) -> None:
    chat = {"instruction": "d", "chosen_response": "yes", "rejected_response": "no"}
    other = write(tmp_path / "chats.jsonl", [chat])
    message = f"{other}: expected text as in {files[0]}, got conversations"
    with pytest.raises(DataError, match="^" + re.escape(message) + "$"):
        load_mixture([*files, other])


def test_named_columns_of_one_source(files: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "c.jsonl", [{"ask": "c0", "chosen": " yes", "rejected": " no"}])
    mixed = load_mixture([*files, other], columns={"prompt": "ask"}).train
    assert prompts(mixed)[-1] == "c0"
    message = f"{files[0]}, {files[1]}: prompt_column: expected a column 'aks', got none with it"
    with pytest.raises(DataError, match="^" + re.escape(message) + "$"):
        load_mixture(files, columns={"prompt": "aks"})
    message = f"{other}: prompt_column: expected a column 'aks', got 'ask', 'chosen', 'rejected'"
    with pytest.raises(DataError, match="^" + re.escape(message) + "$"):
        load_mixture([other], columns={"prompt": "aks"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", Source("owner/name")),
        ("owner/name:small", Source("owner/name", "small")),
        ("owner/name:small:test", Source("owner/name", "small", "test")),
        ("owner/name::test", Source("owner/name", None, "test")),
        ("a.jsonl::train", Source("a.jsonl", None, "train")),
        ("with:colon.jsonl", Source("with:colon.jsonl")),
        ("a.jsonl::dev", Source("a.jsonl::dev")),
        ("with:colon.jsonl::test", Source("with:colon.jsonl", None, "test")),
        ("missing.jsonl::test", Source("missing.jsonl::test")),
        ("data/missing.jsonl:x", Source("data/missing.jsonl:x")),
        ("owner/name:a:b:c", Source("owner/name:a:b:c")),
    ],
)
def test_sources_as_text(
    text: str, expected: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "a.jsonl::dev", "with:colon.jsonl"):
        (tmp_path / name).touch()
    assert parse_source(text) == expected


def test_sources_without_their_split(files: list[Path]) -> None:
    assert without_split("owner/name:small:test") == "owner/name:small"
    assert without_split("owner/name::test") == without_split("owner/name") == "owner/name"
    with pytest.raises(DataError, match=re.escape(f"expected '{files[0]}::small' for a split")):
        load_pairs(f"{files[0]}:small")


def test_configurations_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None = None) -> Any:
        asked.append((path, name))
        return datasets.DatasetDict(test=datasets.Dataset.from_list(pairs("h", 2)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = ["owner/pairs:small", "owner/pairs:large:test", "owner/more"]
    assert len(load_mixture(sources, name="other").train) == 6
    assert asked == [("owner/pairs", "small"), ("owner/pairs", "large"), ("owner/more", "other")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    names = ["<u>", "<e>", "yes", "no", *(f"{letter}{i}" for letter in "abc" for i in range(12))]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<u>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = (
        "{% for m in messages %}{% if m.content == 'b1' %}{{ raise_exception('b1!') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<e>", unk_token="<u>", chat_template=template
    )


def test_the_report_counts_by_source(files: list[Path], tmp_path: Path, tokenizer: Any) -> None:
    long = {"prompt": "c0 " * 9, "chosen": " yes", "rejected": " no"}
    third = write(tmp_path / "c.jsonl", [*pairs("c", 2), long])
    mixed = load_mixture([*files, third], weights=[1, 0.5, 2])
    tokens, report = tokenize_pairs(mixed.train, tokenizer, max_length=5)
    assert tokens.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert report.sources == {str(files[0]): [12, 12], str(files[1]): [4, 4], str(third): [6, 4]}
    lines = str(report).splitlines()
    assert lines[0].startswith("20 of 22 pairs kept, 2 left out: 2 prompts of max_length")
    assert lines[1:4] == [
        f"{files[0]}: 12 of 12 kept", f"{files[1]}: 4 of 4 kept", f"{third}: 4 of 6 kept"
    ]  # fmt: skip


def test_a_refused_conversation_names_its_source(tmp_path: Path, tokenizer: Any) -> None:
    sources = []
    for letter in "ab":
        rows = [
            {"instruction": f"{letter}{i}", "chosen_response": "yes", "rejected_response": "no"}
            for i in range(3)
        ]
        sources.append(write(tmp_path / f"{letter}.jsonl", rows))
    mixed = load_mixture(sources).train
    message = f"dataset: row 5 ({sources[1]}:2): expected a conversation that the chat template"
    with pytest.raises(DataError, match=re.escape(message)):
        tokenize_pairs(mixed, tokenizer)
    tokens, report = tokenize_pairs(mixed, tokenizer, on_bad_row="skip")
    assert len(tokens) == 5 and report.sources[str(sources[1])] == [3, 2]


def test_repeated_rows_keep_their_advantages(tmp_path: Path, tokenizer: Any) -> None:
    source = write(
        tmp_path / "a.jsonl",
        [{**row, "chosen_advantage": i, "rejected_advantage": -i}
         for i, row in enumerate(pairs("a", 3))],
    )  # fmt: skip
    tokens, _ = tokenize_pairs(load_mixture([source], weights=[3]).train, tokenizer)
    assert Counter(tokens["chosen_advantage"]) == {0.0: 3, 1.0: 3, 2.0: 3}
    unknown = tokenizer.convert_tokens_to_ids
    for row in tokens:
        assert row["prompt_ids"] == [unknown(f"a{int(row['chosen_advantage'])}")]


def test_another_mixture_is_another_run(files: list[Path], tokenizer: Any) -> None:
    from fastdaa.train.run_record import rows_fact

    def fact(sources: Any, **options: Any) -> str | None:
        return rows_fact(
            PairRows(tokenize_pairs(load_mixture(sources, **options).train, tokenizer)[0])
        )

    first = fact(files, weights=[0.5, 1], seed=1)
    assert first == fact(files, weights=[0.5, 1], seed=1)
    others = [
        fact(files, weights=[0.5, 1], seed=2), fact(files, weights=[0.5, 2], seed=1),
        fact(files, seed=1), fact(files[::-1], weights=[1, 0.5], seed=1),
    ]  # fmt: skip
    assert len({first, *others}) == 5
    alone = tokenize_pairs(load_pairs(files[0]), tokenizer)[0]
    assert fact(files[:1], weights=[1]) == rows_fact(PairRows(alone))


def test_reference_log_probs_are_shared_with_single_sources(
    files: list[Path], tokenizer: Any
) -> None:
    from fastdaa.train.reference_cache import hash_rows

    def keys(dataset: Any) -> list[bytes]:
        return [*hash_rows(tokenize_pairs(dataset, tokenizer)[0])]

    alone = [key for path in files for key in keys(load_pairs(path))]
    mixed = keys(load_mixture(files, weights=[1, 0.5]).train)
    assert mixed[:12] == alone[:12] and {*mixed} < {*alone}


def test_a_bad_row_comes_out_of_another_process() -> None:
    found = pickle.loads(pickle.dumps(BadRow("reason", "field 'x': message", "x")))
    assert (found.reason, str(found), found.field) == ("reason", "field 'x': message", "x")
    assert str(found.in_columns({"x": "y"})) == "field 'y': message"


def test_skipped_rows_of_sources_are_not_said_twice(
    files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = write(tmp_path / "c.jsonl", [*pairs("c", 2), {}])
    with caplog.at_level(logging.INFO, "fastdaa"):
        load_mixture([*files, bad], on_bad_row="skip")
    assert caplog.messages == []
