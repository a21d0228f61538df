"""Trials: how the process of one contender ended, and what it says of the contender."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from fastdaa.benchmarks import gpu_check
from fastdaa.benchmarks.contenders.base import Outputs
from fastdaa.benchmarks.contenders.fastdaa import Fastdaa
from fastdaa.benchmarks.gpu import trials
from fastdaa.benchmarks.gpu.trials import failed_names, read_trials, run_all, try_one


def options(tmp_path: Path, seconds: float = 20.0) -> argparse.Namespace:
    return argparse.Namespace(
        size="tiny", device="cpu", output=tmp_path / "trials.jsonl", workers=2, seconds=seconds
    )


@pytest.mark.parametrize(
    ("line", "seconds", "status", "last"),
    [
        ("echo fine", 20.0, "ok", "fine"),
        ("echo it is not installed; exit 3", 20.0, "absent", "it is not installed"),
        ("echo run 1 begins; echo 'ptxas: no' >&2; exit 1", 20.0, "failed", "ptxas: no"),
        ("echo run 1 begins; kill -11 $$", 20.0, "failed", "ended by signal 11"),
        ("echo run 1 begins; exec sleep 30", 1.0, "hung", "run 1 begins"),
        ("echo run 1 begins; kill -2 $$; sleep 5", 20.0, "unfinished", "ended by signal 2"),
        ("echo importing; exec sleep 30", 1.0, "unfinished", "importing"),
        (
            "echo run 1 begins; echo 'CUDA out of memory'; exit 1",
            20.0,
            "unfinished",
            "CUDA out of memory",
        ),
        (
            "echo 'CUDA error: CUDA-capable device(s) is/are busy or unavailable'; exit 1",
            20.0,
            "unfinished",
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        ),
        ("sleep 1; echo run 1 begins; exec sleep 30", 1.4, "unfinished", "run 1 begins"),
        (
            "echo run 1 begins; sleep 0.7; echo run 1 is launched; sleep 0.3; echo run 2 begins; "
            "exec sleep 30",
            1.4,
            "unfinished",
            "run 2 begins",
        ),
        (
            "echo run 1 begins; sleep 0.3; echo run 1 is launched; exec sleep 30",
            1.6,
            "hung",
            "run 1 is launched",
        ),
    ],
    ids=[
        "ok",
        "absent",
        "error",
        "crash",
        "hang",
        "told-to-end",
        "slow-import",
        "shared-memory",
        "one-at-a-time",
        "late-start",
        "slow-and-alive",
        "kernel-hangs",
    ],
)
def test_every_end_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, seconds: float, status: str,
    last: str,
) -> None:  # fmt: skip
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    given = options(tmp_path, seconds)
    (trial,) = run_all([("score", "fastdaa-score-fused")], given)
    assert (trial.status, trial.said[-1]) == (status, last)
    assert read_trials(given.output) == [trial]
    left_out = ["fastdaa-score-fused"] if status in ("failed", "hung") else []
    assert failed_names([trial]) == left_out


@pytest.mark.parametrize(
    ("statuses", "left_out"),
    [
        (("ok", "failed"), []),
        (("failed", "failed"), ["trl"]),
        (("failed", "unfinished"), ["trl"]),
        (("ok", "hung"), ["trl"]),
        (("ok", "unfinished"), []),
    ],
    ids=["one-path", "all-paths", "not-known", "hung", "fine"],
)
def test_an_error_on_one_path_leaves_nobody_out(
    statuses: tuple[str, str], left_out: list[str]
) -> None:
    found = [
        trials.Trial(path, "trl", status, 1.0, [])
        for path, status in zip(("score", "frozen"), statuses, strict=True)
    ]
    assert failed_names(found) == left_out


def test_the_cause_is_shown_and_not_the_advice_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'E: CUDA Error: no'; echo 'Compile with X'; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    run_all([("score", "fastdaa-score")], options(tmp_path))
    assert capsys.readouterr().out.rstrip().endswith(" s: E: CUDA Error: no")


def test_the_newest_trial_counts(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    line = '{{"path": "score", "contender": "a", "status": "{}", "seconds": 1, "said": []}}\n'
    path.write_text(line.format("failed") + line.format("ok") + '{"half": ', encoding="utf-8")
    assert [trial.status for trial in read_trials(path)] == ["ok"]
    assert read_trials(tmp_path / "none.jsonl") == []


def test_a_contender_runs_and_an_absent_one_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert try_one("recompute", "fastdaa-recompute", "tiny", "cpu") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert said == [f"run {n} {what}" for n in (1, 2) for what in ("begins", "is launched")]
    if not torch.cuda.is_available():
        assert try_one("score", "cce", "tiny", "cpu") == 3
        words = capsys.readouterr().out
        assert "CUDA" in words or "is not installed" in words


def test_numbers_that_are_not_finite_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Outputs(None, torch.tensor([1.0, float("nan")]), None, None)
    monkeypatch.setattr(Fastdaa, "prepare", lambda self, inputs: lambda: bad)
    with pytest.raises(ArithmeticError, match="logps: expected finite numbers"):
        try_one("score", "fastdaa-score", "tiny", "cpu")


def test_a_rehearsal_gives_trials_more_time(tmp_path: Path) -> None:
    """An interpreted kernel, or a busy machine, would count as a contender that hangs."""
    for selection, factor in (("gpu", 1), ("tiny", gpu_check._REHEARSAL)):
        part = gpu_check.parts("cpu", selection, tmp_path, None)[0]
        seconds = float(part.command[part.command.index("--seconds") + 1])
        assert seconds == factor * trials.SECONDS
        assert factor * part.seconds > seconds, "it ends before its part does"


def test_all_of_ours_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(trials, "run_all", lambda wanted, options: asked.extend(wanted) or [])
    assert trials.main(["--output", str(tmp_path / "x.jsonl")]) == 0
    assert {("score", "fastdaa-score-fused"), ("single_pass", "trl")} <= set(asked)
    assert len(asked) == len(set(asked)) == 13
