"""The step benchmark from cases to rows, with tiny models and trainers in this process."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastdaa.benchmarks.rows import Row, RowFile, read_rows
from fastdaa.benchmarks.step import cases, command, comparison_jobs, open_job, oracle
from fastdaa.benchmarks.step.command import measure_case
from fastdaa.benchmarks.step.contenders import CONTENDERS, Contender
from fastdaa.benchmarks.step.plan import Plan
from fastdaa.benchmarks.step.training import train
from fastdaa.benchmarks.step.workers import WorkerFailed
from fastdaa.cli import main

SMOKE = dataclasses.replace(cases.SELECTIONS["tiny"][0], steps=1)
FACTS = {
    "machine": {"device": "this CPU", "commit": "0000000", "torch": "2"},
    "command": "fastdaa bench step",
    "rate": 1e9,
}
# TRL and peft call transformers by names that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

# Python 3.10 has no TRL 1.16.
NOT_HERE = "CUDA only|trl is not installed"


class Enough(Exception):
    """All steps are done."""


class Replay:
    """A runner that trains in this process at once and hands out the reports one by one."""

    def __init__(self, contender: Contender, plan: Plan):
        self.reports: list[Any] = []
        self.failure: Exception | None = None

        def leave(report: Any) -> bool:
            self.reports.append(report)
            if len(self.reports) > plan.all_steps:
                raise Enough  # what a trainer does at its end is not measured
            return True

        try:
            train(contender, plan, leave)
        except Enough:
            pass
        except ValueError as error:
            self.failure = error

    def load(self) -> None: ...

    def begin(self) -> Any:
        if self.failure is not None:
            raise WorkerFailed(str(self.failure))
        return self.reports.pop(0)

    step = begin

    def stop(self) -> None: ...


Measure = Callable[..., dict[str, Row]]


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """``measure(contenders, **case)``: rows by contender; ``file`` and ``start`` may be given."""

    def run(
        wanted: Sequence[Contender],
        *,
        file: RowFile | None = None,
        start: Any = Replay,
        **case: Any,
    ) -> dict[str, Row]:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        loss, deadline = case.pop("loss", "dpo"), case.pop("deadline", None)
        plan = Plan(dataclasses.replace(SMOKE, **case), str(folder), "cpu", 1, 0, loss)
        rows: list[Row] = []
        measure_case(
            plan, wanted, file or RowFile(None), rows, facts=FACTS, start=start,
            oracle=oracle.expected, deadline=deadline,
        )  # fmt: skip
        return {row["contender"]: row for row in rows}

    return run


def _named(*names: str) -> list[Contender]:
    pytest.importorskip("trl")
    return [CONTENDERS[name] for name in names]


def _slow(*values: Any, name: str) -> Any:
    return pytest.param(*values, id=name, marks=pytest.mark.slow)


ALL = [name for name in CONTENDERS if name != "trl-liger"]
PAIR = ["trl", "fastdaa-prefix_shared"]


@pytest.mark.parametrize(
    ("names", "case"),
    [
        pytest.param([*PAIR, "fastdaa-prefix_shared-cached"], {}, id="full"),
        pytest.param(PAIR, {"tuning": "lora", "activations": "recomputed"}, id="lora"),
        _slow(ALL, {}, name="everyone"),
        _slow(PAIR, {"tuning": "full", "activations": "kept"}, name="kept"),
        _slow(PAIR, {"loss": "ipo"}, name="ipo"),
        _slow(PAIR, {"loss": "slic"}, name="slic"),
    ],
)
def test_everyone_passes_the_gate(measure: Measure, names: list[str], case: dict[str, Any]) -> None:
    rows = measure(_named(*names), **case)
    verdicts = {name: (row["status"], row["reason"]) for name, row in rows.items()}
    assert verdicts == dict.fromkeys(names, ("ok", None))
    for row in rows.values():
        assert row["error"]["loss"] < 1e-5 and row["error"]["grad_norm"] < 1e-4
        assert row["seconds"]["n"] == 1 and row["peak_bytes"] is not None
        assert row["speedup_over_reference"] == pytest.approx(
            rows["trl"]["mean_seconds"] / row["mean_seconds"]
        )
        assert 0 < row["mfu"] <= row["hfu"]
        json.dumps(row)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"loss_type": ["ipo_norm"]}, "loss of step 1: expected 0.693147"),
        ({"beta": 0.5}, "grad_norm of step 1"),
        ({"learning_rate": 0.1}, "loss of step 2"),
    ],
    ids=["another loss", "another beta", "another learning rate"],
)
def test_a_wrong_contender_is_wrong_and_has_no_speedup(
    measure: Measure, config: dict[str, Any], reason: str
) -> None:
    wrong = Contender("fastdaa-wrong", "fastdaa", "prefix_shared", config=config)
    rows = measure([wrong])
    assert rows["fastdaa-wrong"]["status"] == "wrong"
    assert reason in rows["fastdaa-wrong"]["reason"]
    assert rows["fastdaa-wrong"]["speedup_over_reference"] is None


def test_nobody_is_faster_than_a_wrong_reference(measure: Measure) -> None:
    # Its name makes it the reference, whatever the library.
    wrong = Contender("trl", "fastdaa", config={"beta": 0.5})
    rows = measure([wrong, CONTENDERS["fastdaa-packed"]])
    assert rows["trl"]["status"] == "wrong"
    assert rows["fastdaa-packed"]["status"] == "ok"
    assert {row["speedup_over_reference"] for row in rows.values()} == {None}


def test_a_contender_that_fails_leaves_the_others_alone(measure: Measure) -> None:
    broken = Contender("fastdaa-broken", "fastdaa", config={"layout": "sideways"})
    rows = measure([broken, CONTENDERS["fastdaa-packed"]])
    assert rows["fastdaa-broken"]["status"] == "failed"
    assert "sideways" in rows["fastdaa-broken"]["reason"]
    assert rows["fastdaa-packed"]["status"] == "ok"


def test_absent_contenders_have_a_row_with_the_reason(measure: Measure) -> None:
    stranger = Contender("stranger", "no_such_library")
    rows = measure([stranger, CONTENDERS["trl-liger"]])
    assert {row["status"] for row in rows.values()} == {"absent"}
    assert "not installed" in rows["stranger"]["reason"]
    assert re.search(NOT_HERE, rows["trl-liger"]["reason"])


def test_finished_contenders_are_kept(measure: Measure, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = measure([CONTENDERS["fastdaa-packed"]], file=RowFile(path))
    started: list[str] = []

    def start(contender: Contender, plan: Plan) -> Replay:
        started.append(contender.name)
        return Replay(contender, plan)

    names = ("fastdaa-packed", "fastdaa-padded")
    both = [CONTENDERS[name] for name in names]
    second = measure(both, file=RowFile(path), start=start)
    assert started == ["fastdaa-padded"]
    assert second["fastdaa-packed"] == first["fastdaa-packed"]
    assert [row["contender"] for row in read_rows(path)] == list(names)
    other_batch = measure([CONTENDERS["fastdaa-packed"]], file=RowFile(path), start=start, batch=1)
    assert started == ["fastdaa-padded", "fastdaa-packed"], "another case"
    assert other_batch["fastdaa-packed"]["case_params"]["batch"] == 1


def test_what_the_budget_leaves_out_has_a_row_and_is_done_next_time(
    measure: Measure, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    packed = [CONTENDERS["fastdaa-packed"]]
    skipped = measure(packed, file=RowFile(path), deadline=time.monotonic() - 1)["fastdaa-packed"]
    assert (skipped["status"], skipped["reason"]) == ("skipped", "the budget was used up")
    assert measure(packed, file=RowFile(path))["fastdaa-packed"]["status"] == "ok"
    assert [row["status"] for row in read_rows(path)] == ["skipped", "ok"]


def _options(**given: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    command.add_arguments(parser)
    shared = {
        "cases": None, "selection": "tiny", "contenders": None, "losses": None, "device": "cpu",
        "dtype": None, "threads": 1, "seed": 0, "repeats": None, "budget": None, "output": None,
        "fresh": False, "list": False, "command": "fastdaa bench step",
    }  # fmt: skip
    return argparse.Namespace(**{**vars(parser.parse_args([])), **shared, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"contenders": ["tlr"]}, "got 'tlr'; did you mean 'trl'"),
        ({"cases": ["smoky"], "selection": None}, "--cases: expected .a part of. the id of a case"),
        ({"losses": ["dpoo"]}, "--losses: expected names out of dpo"),
        ({"dtype": "float16"}, "--dtype: expected float32 on cpu"),
        ({"data": "pairs.jsonl"}, "--data: expected no --cases and no --selection"),
        ({"data": "nowhere.jsonl", "selection": None}, "--data: expected a file of pairs"),
        ({"model": "llama-9t"}, "--model: expected one of llama-smoke"),
    ],
    ids=["contender", "case", "loss", "dtype", "data and selection", "no data", "model"],
)
def test_bad_options_are_named_before_anything_runs(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command.run(_options(**given))


@pytest.mark.parametrize(
    ("statuses", "code"),
    [({"fastdaa": "ok", "trl": "wrong"}, 0), ({"fastdaa": "wrong"}, 1), ({"fastdaa": "failed"}, 1)],
    ids=["a peer is wrong", "wrong", "failed"],
)
def test_exit_code_is_about_fastdaa(
    monkeypatch: pytest.MonkeyPatch, statuses: dict[str, str], code: int
) -> None:
    def fake(_: Any, __: Any, ___: Any, rows: list[Row]) -> None:
        rows += [{"family": family, "status": status} for family, status in statuses.items()]

    monkeypatch.setattr(command, "_measure_all", fake)
    monkeypatch.setattr(command, "_show", lambda rows: None)
    assert command.run(_options()) == code


def test_interruption_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_measure_all", fake)
    assert command.run(_options()) == 130
    assert "nothing was kept (with --output FILE" in capsys.readouterr().err
    assert command.run(_options(output=tmp_path / "rows.jsonl")) == 130
    assert "rows.jsonl has what is finished; the same command goes" in capsys.readouterr().err


@pytest.mark.parametrize("selection", ["quick", "cpu", "gpu"])
def test_a_case_that_is_cut_short_has_both_sides(selection: str) -> None:
    """On CUDA contenders run one after another, until the budget ends."""
    for case in cases.SELECTIONS[selection]:
        assert case.contenders[:2] == cases.PAIR, case.id


def test_list_names_cases_and_contenders(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(_options(list=True)) == 0
    printed = capsys.readouterr().out
    assert "* smoke/llama-smoke/full: batches of 2" in printed
    assert "trl-precomputed" in printed


@pytest.mark.slow
def test_the_command_with_its_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    path = tmp_path / "rows.jsonl"
    words = ["--selection", "tiny", "--device", "cpu", "--threads", "1", "--steps", "1"]
    wanted = [*words, "--contenders", "trl,fastdaa-prefix_shared", "--output", str(path)]
    call = [sys.executable, "-m", "fastdaa.cli", "bench", "step", *wanted]
    first = subprocess.run(call, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    rows = read_rows(path)
    assert [(row["contender"], row["status"]) for row in rows] == [
        ("trl", "ok"), ("fastdaa-prefix_shared", "ok"),
    ]  # fmt: skip
    assert "leaked" not in first.stderr and "Traceback" not in first.stderr
    assert main(call[call.index("bench") :]) == 0
    assert "building" not in capsys.readouterr().err
    assert read_rows(path) == rows


@pytest.mark.slow
def test_single_steps_on_demand_for_a_comparison() -> None:
    options = _options(contenders=["fastdaa-packed"])
    (job,) = comparison_jobs(options)
    call = open_job(json.loads(json.dumps(job)))
    for _ in range(6):  # more than there are pairs: they come round again
        measured = call()
        assert measured["status"] == "ok", measured["reason"]
        assert measured["seconds"] > 0


def test_only_our_contenders_are_compared_unless_others_are_named() -> None:
    names = {job["contender"] for job in comparison_jobs(_options())}
    assert names and all(name.startswith("fastdaa") for name in names)
    (job,) = comparison_jobs(_options(contenders=["trl"]))
    assert job["contender"] == "trl"
    with pytest.raises(Exception, match=NOT_HERE) as raised:
        open_job({**job, "contender": "trl-liger"})
    assert type(raised.value).__name__ == "Absent"
