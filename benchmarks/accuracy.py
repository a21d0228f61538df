"""``fastdaa bench accuracy``: errors of log-probs, dH and dW against fp64, and determinism.

Log-probs: largest and root-mean-square error a token, and of sums over 512 tokens, in nats.
Gradients: relative Frobenius error and the worst row (:mod:`fastdaa.benchmarks.gate`). Two runs are
deterministic if they return the same bits.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags beyond the shared ones."""


def run(options: argparse.Namespace) -> int:
    """Measure, keep the rows and show them; the exit code."""
    from fastdaa.benchmarks import sweep

    return sweep.run("accuracy", options, timed=False)
