"""Which data the training commands read for their options."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from fastdaa.cli.arguments import parse
from fastdaa.cli.load_data import load_splits
from fastdaa.cli.paths import check_paths
from fastdaa.data import DataError, load_pairs
from fastdaa.data.pairs import PAIRS

COLUMNS = ("prompt", "chosen", "rejected")


def write(path: Path, letter: str, count: int, columns: tuple[str, ...] = COLUMNS) -> str:
    path.parent.mkdir(exist_ok=True)
    rows = [dict(zip(columns, (f"{letter}{i}", " yes", " no"), strict=True)) for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def a(tmp_path: Path) -> str:
    return write(tmp_path / "a.jsonl", "a", 12)


@pytest.fixture
def b(tmp_path: Path) -> str:
    write(tmp_path / "b" / "test.jsonl", "t", 3)
    write(tmp_path / "b" / "train.jsonl", "b", 8)
    return str(tmp_path / "b")


def read(*options: str) -> tuple[list[str], list[str] | None]:
    arguments, _ = parse(["--model", "m/m", "--use_cpu", *options])
    train, evaluation = load_splits(arguments, PAIRS, on_bad_row="error", seed=3)
    return list(train["prompt"]), None if evaluation is None else list(evaluation["prompt"])


def test_one_dataset_is_read_as_it_is(a: str) -> None:
    alone = load_pairs(a)
    assert read("--dataset", a) == (list(alone["prompt"]), None)
    parts = alone.train_test_split(4, seed=3)
    expected = (list(parts["train"]["prompt"]), list(parts["test"]["prompt"]))
    assert read("--dataset", a, "--test_size", "4") == expected
    assert read("--dataset", a, "--max_train_samples", "2") == (["a0", "a1"], None)


def test_a_mixture(a: str, b: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastdaa"):
        train, evaluation = read(
            "--dataset", a, b, "--dataset_weights", "0.5", "1", "--test_size", "4"
        )
    assert evaluation is not None and not {*train} & {*evaluation}
    assert caplog.messages == [
        f"{b}: split train is taken, of test, train",
        "dataset: 11 pairs of 2 sources, 4 held out\n"
        f"{a}: 5 from 12 pairs, weight 0.5, 2 held out\n{b}: 6 from 8 pairs, 2 held out",
    ]
    assert (len(train), len(evaluation)) == (11, 4)
    assert len(read("--dataset", a, b, "--max_train_samples", "7")[0]) == 7
    assert len(read("--dataset", a, "--dataset_weights", "0.25")[0]) == 3


def test_data_to_evaluate_on(a: str, b: str, tmp_path: Path) -> None:
    other = write(tmp_path / "c.jsonl", "c", 1)
    tests = ["t0", "t1", "t2"]
    assert read("--dataset", a, b, "--eval_dataset", other)[1] == ["c0"]
    assert read("--dataset", a, "--eval_dataset", f"{b}::test", other)[1] == [*tests, "c0"]
    # The split to evaluate on takes the place of one to train on.
    assert read("--dataset", f"{b}::train", "--eval_split", "test")[1] == tests
    assert read("--dataset", f"{b}::train", a, "--eval_dataset", b, "--eval_split", "test") == (
        [f"b{i}" for i in range(8)] + [f"a{i}" for i in range(12)], tests
    )  # fmt: skip
    with pytest.raises(DataError, match=re.escape(f"{a}: split: expected one of train, got 'test")):
        read("--dataset", b, a, "--eval_split", "test")


def test_named_columns_may_be_missing_in_evaluation_data(a: str, b: str, tmp_path: Path) -> None:
    named = write(tmp_path / "d.jsonl", "d", 2, ("ask", "good", "bad"))
    options = ["--prompt_column", "ask", "--chosen_column", "good", "--rejected_column", "bad"]
    expected = ["d0", "d1"], ["t0", "t1", "t2"]
    assert read("--dataset", named, "--eval_dataset", f"{b}::test", *options) == expected
    assert len(read("--dataset", named, a, *options)[0]) == 14
    with pytest.raises(DataError, match="prompt_column: expected a column 'ask', got 'prompt', "):
        read("--dataset", a, *options)


def test_a_list_in_yaml(a: str, b: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"dataset: [{a}, '{b}::test']\ndataset_weights: [1, 2]\n")
    assert len(read("--config", str(path))[0]) == 12 + 2 * 3
    assert len(read("--config", str(path), "--dataset", b, "--dataset_weights", "0.5")[0]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "a", "b", "--dataset_weights", "1"], "dataset_weights: expected one a data"),
        (["--dataset", "a", "--dataset_weights", "-1"], "dataset_weights: expected a finite numbe"),
        (["--dataset", "a", "a"], "dataset: expected every source once, got a again"),
        (["--dataset", "a", "--eval_dataset", "b", "b"], "expected every source once, got b again"),
    ],
    ids=["too few weights", "negative weight", "twice", "evaluation twice"],
)
def test_wrong_options(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(["--model", "m/m", "--use_cpu", *options])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("{a},{b}", "there is no '{a},{b}' (several are separated by spaces)"),
        ("{a}x", "there is no '{a}x' (did you mean '{a}'?)"),
        ("{a}:small", "{a}:small: expected '{a}::small' for a split, got 'small' as a config"),
    ],
    ids=["commas", "near", "configuration"],
)
def test_paths(dataset: str, message: str, a: str, b: str, tmp_path: Path) -> None:
    given: Any = dataset.format(a=a, b=b)
    arguments, _ = parse(["--model", "m/m", "--use_cpu", "--dataset", b, given])
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(message.format(a=a, b=b))):
        check_paths(arguments, str(tmp_path / "out"), None)


def test_a_configuration_of_local_files(a: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"dataset_config: .* got 'small' for {re.escape(a)}$"):
        read("--dataset", a, "--dataset_config", "small")


def test_stages_of_a_pipeline_get_the_same_data(a: str, b: str) -> None:
    from fastdaa.cli import online_arguments, pipeline

    words = ["--dataset", a, b, "--dataset_weights", "1.0", "0.5", "--chosen_column", "good"]
    arguments, config = online_arguments.parse(
        ["--model", "m/m", "--pipeline", "--output_dir", "out", *words]
    )
    passed = pipeline._stage_argv(arguments, config, "m/m", Path("out/sft"), {})
    for part in (words[:3], words[3:6], words[6:]):
        start = passed.index(part[0])
        assert passed[start : start + len(part)] == part
