"""``fastdaa bench head``: token log-probs and cross-entropy of the LM head, and their gradients.

Every contender gets the same hidden states, weight and targets. Its answer is held against fp64
before it is timed; all are timed in turns, beside the bare matrix products.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

KIND = "head"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags beyond the shared ones."""


def run(options: argparse.Namespace) -> int:
    """Measure, keep the rows and show them; the exit code."""
    from fastdaa.benchmarks import sweep

    return sweep.run(KIND, options, timed=True)


def comparison_jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What ``--compare`` measures in both versions; see :mod:`fastdaa.benchmarks.versions_job`."""
    from fastdaa.benchmarks import versions_job

    return versions_job.comparison_jobs(KIND, options)


def open_job(job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """One measurement a call."""
    from fastdaa.benchmarks import versions_job

    return versions_job.open_job(job)
