"""``make gpu-check`` without a GPU: parts that hang or fail take nothing from the others."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from fastdaa.benchmarks import gpu_check
from fastdaa.benchmarks.gpu_check import Part
from fastdaa.benchmarks.rows import read_rows

ROW = '{{"status": "{}"}}\\n'


def _part(name: str, code: int, line: str, seconds: float = 20.0, rows: Path | None = None) -> Part:
    return Part(name, code, (sys.executable, "-c", line), seconds, rows)


def test_every_part_runs_and_the_exit_code_says_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "head_cuda.jsonl"
    rows.write_text(ROW.format("ok").replace("\\n", "\n"), encoding="utf-8")
    write = f"open({str(rows)!r}, 'a').write('{ROW.format('wrong')}')"
    found = [
        _part("tests", 1, "pass"),
        _part("head", 2, f"{write}; raise SystemExit(1)", rows=rows),
        _part("memory", 4, "import time; time.sleep(60)", seconds=0.5),
        _part("step", 16, "import os; os.kill(os.getpid(), 9)"),
        _part("accuracy", 8, "pass"),
    ]
    assert gpu_check.check(found) == 2 + 4 + 16
    said = capsys.readouterr()
    lines = [line.split() for line in said.out.split("summary")[1].splitlines() if line.strip()]
    assert [(words[0], words[1]) for words in lines[:5]] == [
        ("tests", "ok"), ("head", "exit"), ("memory", "stopped"), ("step", "SIGKILL"),
        ("accuracy", "ok"),
    ]  # fmt: skip
    assert "1 wrong" in said.out, "rows of this run only"
    assert "failed: head, memory, step" in said.err


def test_a_part_that_hangs_is_told_first_and_its_children_end_with_it(tmp_path: Path) -> None:
    """Told as by Ctrl-C: it still writes what it has. Its child never listens."""
    mark, child = tmp_path / "told", tmp_path / "child"
    line = (
        "import subprocess, sys, time, signal\n"
        "quiet = 'import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); '\n"
        "quiet += 'time.sleep(60)'\n"
        "process = subprocess.Popen([sys.executable, '-c', quiet])\n"
        f"open({str(child)!r}, 'w').write(str(process.pid))\n"
        "try:\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    open({str(mark)!r}, 'w').close()\n"
    )
    outcome = gpu_check.run_part(_part("step", 16, line), seconds=2.0)
    assert outcome.problem == "stopped after 2 s"
    assert mark.exists()
    state = Path(f"/proc/{child.read_text()}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child is still there")


def test_parts_that_do_not_fit_any_more_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = [_part("tests", 1, "import time; time.sleep(1)"), _part("head", 2, "pass")]
    assert gpu_check.check(found, all_seconds=0.8) == 3
    assert "not started: the time was used up" in capsys.readouterr().out


def test_parts_fit_eight_minutes_and_can_be_told_apart(tmp_path: Path) -> None:
    found = gpu_check.parts("cuda", "gpu", tmp_path, tmp_path)
    assert [part.name for part in found] == ["tests", "head", "memory", "accuracy", "step"]
    assert sum(part.seconds for part in found) <= 480
    assert sum(part.code for part in found) == 31
    assert "tests" not in [part.name for part in gpu_check.parts("cuda", "gpu", tmp_path, None)]


def test_no_gpu_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main(["--device", "cuda"]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("part", ["accuracy", "step"])
def test_dry_run_on_a_cpu(tmp_path: Path, part: str) -> None:
    words = ["--device", "cpu", "--selection", "tiny", "--results", str(tmp_path)]
    assert gpu_check.main([*words, "--only", part]) == 0
    rows = read_rows(tmp_path / f"{part}_cpu.jsonl")
    assert {row["status"] for row in rows if row["contender"].startswith("fastdaa")} == {"ok"}
