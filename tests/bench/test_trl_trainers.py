"""TRL's trainers on both heads: what is given to them, and that losses are checked first."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from fastdaa.benchmarks import trl_trainers

SMALL = ["--rounds", "1", "--completions", "2", "--length", "6", "--hidden", "16", "--vocab", "40"]

# What peers deprecate in each other is not this project's to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("trainer", ["DPO", "KTO", "SFT"])
def test_every_text_has_the_tokens_that_were_asked_for(trainer):
    options = SimpleNamespace(vocab=40, completions=2, length=6)
    rows, tokens = trl_trainers.dataset(trainer, options), trl_trainers.tokenizer(40)
    for row in rows:
        texts = {name: text for name, text in row.items() if isinstance(text, str)}
        lengths = {name: len(tokens(text)["input_ids"]) for name, text in texts.items()}
        assert lengths.pop("prompt") == 6 and set(lengths.values()) == {5}  # and the end


def test_a_row_a_case(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    arguments = [*SMALL, "--cases", "dpo-wpo", "sft-prompts", "--output", str(output)]
    assert trl_trainers.main(arguments) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["dpo-wpo", "sft-prompts"]
    for row in rows:
        assert row["median_s"].keys() == row["losses"].keys() == {"fastdaa", "trl"}
        assert row["trl"].startswith("1.16.") and row["commit"]
    assert capsys.readouterr().out.count(" x (medians of 1)") == 2


def test_nothing_wrong_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(trl_trainers, "_TOLERANCE", -1.0)
    assert trl_trainers.main([*SMALL, "--cases", "sft"]) == 1
    assert "wrong, so it is not timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--completions", "3"], "expected an even number, got 3"),
        (["--rounds", "0"], "--rounds: expected 1 or more, got 0"),
        (["--vocab", "4"], "expected --length above 1 and --vocab above 4"),
    ],
)
def test_bad_flags(capsys, flags, error):
    with pytest.raises(SystemExit):
        trl_trainers.main(flags)
    assert error in capsys.readouterr().err
