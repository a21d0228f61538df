"""Flags of ``pytest benchmarks/``; see bench_contenders.py."""

from __future__ import annotations

import pytest

from fastdaa.benchmarks.flags import SELECTIONS


def pytest_addoption(parser: pytest.Parser) -> None:
    """The flags of ``fastdaa bench`` that make sense here."""
    group = parser.getgroup("fastdaa benchmarks")
    group.addoption("--selection", choices=SELECTIONS, default="quick", help="cases to run")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    group.addoption("--seed", type=int, default=0, help="of all inputs (default: 0)")
