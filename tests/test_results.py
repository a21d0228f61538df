"""The README's numbers are those of the committed results: same rows, same values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "step_cpu.jsonl"


def _rows() -> dict[str, dict[str, Any]]:
    rows = (json.loads(line) for line in RESULTS.read_text().splitlines())
    return {row["contender"]: row for row in rows}


def _line(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """One line of the README's table."""

    def times(name: str) -> str:
        return f"{rows[name]['median_seconds'] / row['median_seconds']:.1f} x"

    return (
        f"| {row['contender']} | {row['median_seconds']:.2f} | {row['pairs_per_second']:.2f} "
        f"| {row['peak_mib']:.0f} | {times('trl')} | {times('trl, sorted')} |"
    )


@pytest.mark.parametrize("contender", ["trl", "trl, sorted", "fastdaa", "fastdaa, sorted"])
def test_readme_shows_the_committed_numbers(contender: str) -> None:
    rows = _rows()
    assert _line(rows[contender], rows) in (ROOT / "README.md").read_text()


def test_readme_names_device_versions_and_commit() -> None:
    machine = _rows()["fastdaa"]["machine"]
    text = (ROOT / "README.md").read_text()
    for name in ("commit", "torch", "transformers", "trl"):
        assert str(machine[name]) in text, name


def test_results_show_what_was_promised() -> None:
    """At least 4 times TRL's default and 1.8 times TRL fed sorted pairs, with less memory."""
    rows = _rows()
    ours = rows["fastdaa"]
    assert rows["trl"]["median_seconds"] > 4 * ours["median_seconds"]
    assert rows["trl, sorted"]["median_seconds"] > 1.8 * ours["median_seconds"]
    assert ours["peak_mib"] < min(rows[n]["peak_mib"] for n in ("trl", "trl, sorted"))
    for a, b in (("trl", "fastdaa"), ("trl, sorted", "fastdaa, sorted")):
        first_five = zip(rows[a]["losses"][:5], rows[b]["losses"][:5], strict=True)
        assert all(abs(x - y) < 1e-4 for x, y in first_five)
