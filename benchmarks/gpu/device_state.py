"""Clocks, power and temperature of the GPUs, by nvidia-smi: what a strange number may come from.

A device is idle when a part has ended. What its clocks were while it worked is asked meanwhile.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import threading
from types import TracebackType
from typing import NamedTuple

from fastdaa.counted import counted

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Percent of the time in which kernels ran, by nvidia-smi, from which a device counts as busy.
_BUSY = 50.0


def state_of_the_device() -> str:
    """As it is now, in one line, with the most that it may have."""
    asked = "name,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu,memory.used"
    command = ["nvidia-smi", f"--query-gpu={asked},compute_mode", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {type(error).__name__}"
    found = "; ".join(done.stdout.split("\n")[:-1]) or done.stderr.strip()
    return (
        f"GPU (name; clock now, most; power, its limit; temperature; memory in use; mode): {found}"
    )


class Sample(NamedTuple):
    """A GPU at one moment."""

    clock: float
    """MHz."""
    power: float
    """W."""
    temperature: float
    """Degrees Celsius."""
    busy: float
    """Percent."""


def read_sample(line: str) -> Sample | None:
    """A line of nvidia-smi; None where it does not know a number, or says something else."""
    fields = [_NUMBER.search(field) for field in line.split(",")]
    numbers = [float(field.group()) for field in fields if field is not None]
    return Sample(*numbers) if len(fields) == len(numbers) == len(Sample._fields) else None


class Watch:
    """Samples every few seconds, each from a process of nvidia-smi, whose own loop may keep its
    lines to itself for minutes; none where there is no such program.

    On a machine with several GPUs all of them are asked, and those that work are reported.
    """

    def __init__(self, command: tuple[str, ...] = ("nvidia-smi",), seconds: float = 3.0):
        asked = "--query-gpu=clocks.sm,power.draw,temperature.gpu,utilization.gpu"
        self._command = [*command, asked, "--format=csv,noheader"]
        self._seconds = seconds
        self._samples: list[Sample] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(self._seconds):
            try:
                asked = subprocess.run(
                    self._command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                    errors="replace", timeout=10,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                continue
            except OSError:
                return
            found = map(read_sample, asked.stdout.splitlines())
            self._samples.extend(sample for sample in found if sample is not None)

    def words(self) -> str:
        """What was seen since the last call, in one line; empty if the device was never busy."""
        seen, self._samples = self._samples, []
        busy = [sample for sample in seen if sample.busy >= _BUSY]
        if not busy:
            return ""
        clocks = [sample.clock for sample in busy]
        return (
            f"GPU while it was busy ({counted(len(busy), 'sample')}): clock {min(clocks):.0f} to "
            f"{max(clocks):.0f} MHz, median {statistics.median(clocks):.0f}; power up to "
            f"{max(s.power for s in busy):.0f} W; up to {max(s.temperature for s in busy):.0f} C"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._done.set()
        self._thread.join(2.0)  # a driver that hangs is not waited for
