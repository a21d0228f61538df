"""Values in error messages: a person has to be able to read them."""

from __future__ import annotations

import pytest

from fastdaa.data import DataError, load_pairs
from fastdaa.data.examples import EXAMPLES
from fastdaa.train import PreferenceConfig
from fastdaa.validation import check_choice, shown


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("short", "'short'", id="text"),
        pytest.param(0.5, "0.5", id="number"),
        pytest.param(None, "None", id="none"),
        pytest.param("x" * 60, repr("x" * 60), id="just fits"),
        pytest.param("x" * 61, repr("x" * 57 + "..."), id="long text"),
        pytest.param(list(range(90)), str(list(range(90)))[:57] + "...", id="long list"),
    ],
)
def test_shown(value, expected):
    assert shown(value) == expected


@pytest.mark.parametrize("load", [load_pairs, EXAMPLES.load])
def test_a_list_where_an_object_was_expected(tmp_path, load):
    path = tmp_path / "data.jsonl"
    path.write_text("[" + ", ".join(['{"prompt": "%s"}' % ("x" * 500)] * 40) + "]\n")
    with pytest.raises(DataError, match=r"data.jsonl:1: expected an object with fields, got list"):
        load(path)
    with pytest.raises(DataError) as caught:
        load(path)
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize("option", ["layout", "loss_kwargs", "attention"])
def test_options(option, tmp_path):
    with pytest.raises(ValueError, match=f"{option}: expected") as caught:
        PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, **{option: "z" * 5000})
    assert len(str(caught.value)) < 300


def test_choices():
    with pytest.raises(ValueError, match=r"name: expected one of 'a', got 'zzz.*\.\.\.'$"):
        check_choice("name", "z" * 900, ["a"])
