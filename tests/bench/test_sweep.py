"""What `fastdaa bench head` and its like measure when asked for it, and what they say meanwhile."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdaa.benchmarks import head, side_by_side, sweep
from fastdaa.benchmarks.cases import HEADS, SELECTIONS, Case, select_cases
from fastdaa.benchmarks.contenders import ALL, Absent, cce, pytorch
from fastdaa.benchmarks.oracle import _tile_bytes
from fastdaa.benchmarks.progress import progress
from fastdaa.cli import main

ROOT = Path(__file__).resolve().parents[2]


def options(**changes: Any) -> argparse.Namespace:
    values = {
        "cases": None, "selection": None, "contenders": None, "losses": None, "device": "cpu",
        "dtype": None, "threads": 1, "seed": 0, "repeats": 1, "budget": None, "output": None,
        "fresh": False, "list": False, "command": "a test",
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SELECTIONS["head"], "quick", [Case("tiny", 32), Case("tiny", 32, "score")])
    monkeypatch.setattr(sweep, "measure_roof", lambda device, dtypes: None)


def test_a_whole_id_is_that_case_alone() -> None:
    """It is the beginning of the id of the same case with an online reference."""
    name = "small-dpo-n256-fp32-peaked-trained"
    assert [case.id for case in select_cases("loss", "quick", names=[name])] == [name]
    part = select_cases("loss", "quick", names=["small-dpo"])
    assert {case.reference for case in part} == {"given", "online"}


def test_a_name_like_none_gets_no_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'small-ce-n256-fp32-peaked-trained'"):
        select_cases("head", "quick", names=["smal-ce-n256-fp32-peaked-trained"])
    with pytest.raises(ValueError, match=r"got 'zzz'; --list"):
        select_cases("head", "quick", names=["zzz"])


@pytest.mark.parametrize("kind", SELECTIONS)
def test_a_gpu_is_asked_for_cases_of_its_size(kind: str) -> None:
    small = sweep.chosen_cases(kind, options())
    assert small == SELECTIONS[kind]["quick"]
    assert sweep.chosen_cases(kind, options(device="cuda")) == SELECTIONS[kind]["gpu"]
    assert sweep.chosen_cases(kind, options(device="cuda", selection="quick")) == small


@pytest.mark.parametrize("kind", ["head", "accuracy"])
def test_losses_where_there_are_none_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"the cases of {kind} have no loss"):
        sweep.chosen_cases(kind, options(losses=["dpo"]))


def test_a_loss_without_a_case_is_an_error() -> None:
    """It would be left out, and the table would not say so."""
    for losses in (["dpo", "ipo"], ["ipo"]):
        with pytest.raises(ValueError, match=r"losses: expected some of dpo, .* got 'ipo';"):
            sweep.chosen_cases("loss", options(losses=losses))
    chosen = sweep.chosen_cases("loss", options(losses=["ipo", "dpo"], selection="cpu"))
    assert {case.work for case in chosen} == {"dpo", "ipo"}


def test_contenders_for_other_work_are_an_error(tiny: None) -> None:
    with pytest.raises(ValueError, match="got fastdaa-frozen, who do other work"):
        head.run(options(contenders=["fastdaa-frozen"]))


def test_what_is_finished_runs_no_more_for_who_is_absent(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An absent contender has no row that counts as finished; nothing is measured beside it."""
    asked = options(contenders=["pytorch", "cce", "fastdaa"], output=tmp_path / "rows.jsonl")
    assert head.run(asked) == 0
    first, before = capsys.readouterr().out, (tmp_path / "rows.jsonl").read_text()

    def refuse(*_: object) -> None:
        pytest.fail("measured once more")

    monkeypatch.setattr(side_by_side, "make_inputs", refuse)
    assert head.run(asked) == 0
    assert (tmp_path / "rows.jsonl").read_text() == before
    again = capsys.readouterr().out
    assert "cce absent" in again and "floor-3u" in again
    assert sorted(again.split()) == sorted(first.split()), "the same table"


def test_all_that_were_asked_for_are_absent(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(self: Any) -> str:
        raise Absent("it is not here")

    monkeypatch.setattr(pytorch.Materialised, "version", absent)
    assert head.run(options(contenders=["pytorch"])) == 0
    assert "pytorch absent: it is not here" in capsys.readouterr().out


def test_an_interruption_without_a_file_says_that_nothing_was_kept(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "measure_case", interrupt)
    assert head.run(options(contenders=["pytorch"])) == 130
    assert "nothing was kept (with --output FILE" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_costs_no_measurement(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "measure_case", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("")
    words = f"bench head --device cpu --output {tmp_path / 'file' / 'rows.jsonl'}"
    assert main(words.split()) == 2
    assert "--output: expected a file that can be written, got" in capsys.readouterr().err


def test_progress_without_a_terminal_is_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("case 1 of 2") as tell:
        for words in ("oracle", "trl", "trl-metrics", "timing", "timing, round 1", "timing"):
            tell(words)
    said = capsys.readouterr()
    lines = [line.split("  ")[-1] for line in said.err.splitlines()]
    assert lines == [f"case 1 of 2: {x}" for x in ("oracle", "trl", "trl-metrics", "timing")]
    assert said.out == ""


def test_a_run_tells_what_it_does(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert head.run(options(contenders=["pytorch"])) == 0
    said = capsys.readouterr().err
    assert "case 1 of 2, tiny-logps-n32-fp32-peaked-trained: oracle" in said
    assert "case 2 of 2, tiny-score-n32-fp32-peaked: timing" in said
    assert "round" not in said


@pytest.mark.parametrize("name", ["torch-compile", "cce-torch-compile"])
def test_the_compiler_is_tried_on_the_device_that_is_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without a C++ compiler compiles for its GPU all the same."""
    problems = {"cpu": "no C++ compiler", "cuda": None}
    monkeypatch.setattr(pytorch, "compiler_problem", problems.__getitem__)
    monkeypatch.setattr(cce, "installed", lambda package, hint: "1")
    (contender,) = (c for c in ALL if c.name == name)
    assert contender.version()
    contender.check_device("cuda")
    with pytest.raises(Absent, match=r"no C\+\+ compiler"):
        contender.check_device("cpu")


@pytest.mark.parametrize(("free", "tile"), [(130 << 30, 4 << 30), (16 << 30, 1 << 30)])
def test_the_oracle_takes_less_of_a_small_device(
    free: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    assert _tile_bytes(torch.device("cuda")) == tile


@pytest.mark.parametrize("lr", ["nan", "-1", "inf", "fast"])
def test_learning_rates_that_are_none_are_refused(
    lr: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "step", f"--lr={lr}", "--list"]) == 2
    assert "--lr: expected a number" in capsys.readouterr().err


def test_the_page_says_how_large_the_small_heads_are() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in ("small", "pythia-1b"):
        head = HEADS[name]
        assert f"of V = {head.vocab} and D = {head.hidden}" in page, name
