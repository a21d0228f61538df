"""What the GPU check says about the GPU itself, by a program in the place of nvidia-smi."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fastdaa.benchmarks.gpu.device_state import Sample, Watch, read_sample, state_of_the_device


def _program(folder: Path, line: str) -> Path:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("echo 'NVIDIA H200, 1980 MHz, 76 W, 0 MiB, Default'", "mode): NVIDIA H200, 1980 MHz"),
        ("echo 'Failed to initialize NVML' >&2; exit 9", "mode): Failed to initialize NVML"),
        (None, "nvidia-smi: FileNotFoundError"),
    ],
    ids=["one", "broken", "none"],
)
def test_the_log_says_how_the_device_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str | None, said: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if line is not None:
        _program(tmp_path, line)
    assert said in state_of_the_device()


@pytest.mark.parametrize(
    ("line", "sample"),
    [
        ("1755 MHz, 698.41 W, 61, 100 %", Sample(1755.0, 698.41, 61.0, 100.0)),
        ("345 MHz, [N/A], 30, 0 %", None),
        ("Unable to determine the device handle", None),
        ("1755 MHz, 698.41 W, 61", None),
    ],
    ids=["all", "unknown", "words", "short"],
)
def test_a_line_is_a_sample_or_nothing(line: str, sample: Sample | None) -> None:
    assert read_sample(line) == sample


def test_clocks_are_those_of_the_moments_when_the_device_worked(tmp_path: Path) -> None:
    lines = [
        "345 MHz, 76 W, 30, 0 %",
        *(f"{c} MHz, {c / 2} W, 60, 99 %" for c in (1410, 1500, 1980)),
    ]
    asked = tmp_path / "asked"
    said = "\n".join(lines)
    # All at the first question, then nothing that counts.
    program = _program(tmp_path, f"[ -e {asked} ] || echo '{said}'; : > {asked}; echo 'no device'")
    with Watch((str(program),), seconds=0.01) as watch:
        ends = time.monotonic() + 10
        while len(watch._samples) < len(lines) and time.monotonic() < ends:
            time.sleep(0.01)
        assert watch.words() == (
            "GPU while it was busy (3 samples): clock 1410 to 1980 MHz, median 1500; power up to "
            "990 W; up to 60 C"
        )
        assert watch.words() == "", "told once"
    assert not watch._thread.is_alive()


def test_no_program_is_no_failure(tmp_path: Path) -> None:
    with Watch((str(tmp_path / "nvidia-smi"),), seconds=0.01) as watch:
        watch._thread.join(10)
        assert watch.words() == "" and not watch._thread.is_alive()
