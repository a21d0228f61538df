"""``fastdaa bench memory``: peak memory above the inputs and the returned gradients.

On CUDA from the caching allocator, on CPU from every allocation that the profiler reports
(:func:`fastdaa.benchmarks.measure.measure_peak`). The gate is the same; nothing is timed.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags beyond the shared ones."""


def run(options: argparse.Namespace) -> int:
    """Measure, keep the rows and show them; the exit code."""
    from fastdaa.benchmarks import sweep

    return sweep.run("memory", options, timed=False)
