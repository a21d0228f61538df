"""Losses over betas, seeds and sizes: many runs, kept as :mod:`fastdaa.study.kept_runs` does.

The study's folder also gets ``world/``: references, made once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastdaa.study.kept_runs import REFERENCES, SweepResult, complete, keep
from fastdaa.study.plan import Run, unique

if TYPE_CHECKING:
    from rich.console import Console

    from fastdaa.study.language import Language
    from fastdaa.study.presets import ModelSize, Preset


def sweep(
    runs: Sequence[Run],
    output: str | Path,
    *,
    workers: int | None = None,
    console: Console | None = None,
) -> SweepResult:
    """Runs what is not done yet, and writes ``points.jsonl`` from everything that is.

    References come first, then the runs, all by the same workers: starting one takes seconds.

    Args:
        runs: see :mod:`fastdaa.study.plan`.
        output: the study's folder.
        workers, console: as in :func:`fastdaa.study.kept_runs.complete`.

    Raises:
        ValueError, KeyboardInterrupt: as there.
    """
    return complete(
        unique(runs), Path(output), _perform, _kind_of,
        before=lambda pending: list(dict.fromkeys(map(_World.of, pending))),
        workers=workers, console=console,
    )  # fmt: skip


class _World(NamedTuple):
    """What has a reference of its own."""

    preset: Preset
    size: ModelSize
    seed: int
    language: Language

    @classmethod
    def of(cls, run: Run) -> _World:
        return cls(run.preset, run.size, run.seed, run.language)

    @property
    def id(self) -> str:
        return f"reference {self.preset.name}-s{self.seed}-{self.size.name}"


def _kind_of(task: _World | Run) -> str:
    return "runs" if isinstance(task, Run) else "references"


def _perform(output: Path, task: _World | Run) -> str:
    """Makes a reference, or does a run and keeps it; a few words about it."""
    from fastdaa.study.run_one import run_one, setting

    began = time.perf_counter()
    if isinstance(task, _World):
        setting(*task, output / REFERENCES)
        return f"{time.perf_counter() - began:.1f} s"
    rows = run_one(task, output / REFERENCES)
    keep(task, rows, time.perf_counter() - began, output)
    last = rows[-1]
    return f"KL {last['kl']:.2f}  gold {last['gold']:+.2f}  {last['seconds']:.1f} s"
