"""``fastdaa bench report``: pictures and one page from the rows of earlier runs."""

from __future__ import annotations

from fastdaa.benchmarks.report.command import add_arguments, run

__all__ = ["add_arguments", "run"]
