"""The callbacks of every run of the trainer."""

from __future__ import annotations

from transformers import TrainerCallback

from fastdaa.train.curves import Curves, draw_curves
from fastdaa.train.interrupt import Interrupt, restore_signals, was_interrupted
from fastdaa.train.metrics_writer import METRICS_FILE, MetricsWriter, read_metrics
from fastdaa.train.progress import Progress, use_progress
from fastdaa.train.steps_left import NothingLeft

__all__ = [
    "METRICS_FILE",
    "Curves",
    "Interrupt",
    "MetricsWriter",
    "NothingLeft",
    "Progress",
    "default_callbacks",
    "draw_curves",
    "read_metrics",
    "restore_signals",
    "use_progress",
    "was_interrupted",
]


def default_callbacks(*, curves: bool = True) -> list[TrainerCallback]:
    """New callbacks of one trainer, in the order that they need: rows are written, then drawn."""
    return [Interrupt(), NothingLeft(), MetricsWriter(), *([Curves()] if curves else [])]
