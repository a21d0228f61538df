"""The whole training step beside TRL's ``DPOTrainer``: same model, same pairs, same order."""

from __future__ import annotations

from fastdaa.benchmarks.step.command import add_arguments, run
from fastdaa.benchmarks.step.comparison import comparison_jobs, open_job

__all__ = ["add_arguments", "comparison_jobs", "open_job", "run"]
