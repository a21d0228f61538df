"""The README's numbers are those of the committed results: same rows, same values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastdaa.benchmarks.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STEP = RESULTS / "step_cpu.jsonl"
TABLE = ("trl", "trl-sorted", "fastdaa-prefix_shared", "fastdaa-prefix_shared-sorted")
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows() -> Rows:
    """The newest row of each contender on the real pairs."""
    found = (row for row in read_rows(STEP) if row["case_params"]["workload"] == "data")
    return {row["contender"]: row for row in found if row["case_params"]["loss"] == "dpo"}


def _line(row: dict[str, Any], rows: Rows) -> str:
    """One line of the README's table. Ratios are of pairs a second."""

    def times(name: str) -> str:
        return f"{row['pairs_per_second'] / rows[name]['pairs_per_second']:.1f} x"

    return (
        f"| {row['contender']} | {row['mean_seconds']:.2f} | {row['pairs_per_second']:.2f} "
        f"| {row['peak_bytes'] / 2**20:.0f} | {times('trl')} | {times('trl-sorted')} |"
    )


def test_readme_shows_the_committed_numbers(readme: str, rows: Rows) -> None:
    expected = "\n".join(_line(rows[name], rows) for name in TABLE)
    assert expected in readme, f"expected these lines in README.md:\n{expected}"


def test_readme_says_what_was_measured_on_what(readme: str, rows: Rows) -> None:
    row = rows["fastdaa-prefix_shared"]
    params, stats = row["case_params"], row["case_params"]["length_statistics"]
    words = " ".join(readme.split())
    for expected in (
        f"commit {row['machine']['commit']}",
        *(f"{name} {row['machine'][name]}" for name in ("torch", "transformers", "trl")),
        f"{stats['pairs']} of 300 real chat pairs",
        f"median prompt {stats['prompt_tokens']['median']} tokens",
        f"median completion {stats['completion_tokens']['median']}",
        f"batches of {params['batch']}",
        f"{row['threads']} threads",
        f"{row['seconds']['n']} interleaved steps",
    ):
        assert expected in words, f"expected {expected!r} in README.md"


def test_losses_agree_within_what_the_readme_says(readme: str, rows: Rows) -> None:
    claimed = re.search(r"first five steps agree within ([\d.e-]+\d)", " ".join(readme.split()))
    assert claimed is not None
    worst = 0.0
    for theirs, ours in (TABLE[::2], TABLE[1::2]):
        first_five = zip(rows[theirs]["losses"][:5], rows[ours]["losses"][:5], strict=True)
        worst = max(worst, *(abs(a - b) for a, b in first_five))
    assert worst <= float(claimed[1]), f"they agree within {worst:.2g}"


def test_results_show_what_was_promised(rows: Rows) -> None:
    """At least 4 times TRL's default and 1.8 times TRL fed sorted pairs, with less memory."""
    ours = rows["fastdaa-prefix_shared"]
    assert ours["pairs_per_second"] > 4 * rows["trl"]["pairs_per_second"]
    assert ours["pairs_per_second"] > 1.8 * rows["trl-sorted"]["pairs_per_second"]
    assert ours["peak_bytes"] < min(rows[name]["peak_bytes"] for name in ("trl", "trl-sorted"))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_no_committed_row_of_ours_is_wrong_or_unaccounted_for(path: Path) -> None:
    for row in read_rows(path):
        where = f"{row['case']}, {row['contender']}"
        if row["contender"].startswith("fastdaa"):
            assert row["status"] not in ("wrong", "failed"), f"{where}: {row['reason']}"
        if row["status"] != "ok":
            assert row["reason"], where
            assert row["speedup_over_reference"] is None, where
        machine = row["machine"]
        assert machine["device"] and machine["commit"] and machine["torch"], where
        assert row["command"], where


CONTENDERS = (
    "pytorch", "torch-compile", "torch-linear-ce", "trl", "liger-dpo", "cce-torch-compile",
    "fastdaa-score", "fastdaa-frozen", "fastdaa-single-pass", "fastdaa-recompute",
)  # fmt: skip


def _finished(kind: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(RESULTS / f"{kind}_cpu.jsonl") if row["status"] == "ok"]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["head", "loss"])
def test_speed_ups_of_the_page_are_those_of_the_rows(page: str, kind: str) -> None:
    rows = [row for row in _finished(kind) if row["contender"] in CONTENDERS]
    header = next(text for text in page.splitlines() if text.startswith(f"| {kind}, times"))
    columns = header.strip("| ").split(" | ")[1:]
    cases = dict.fromkeys(row["case"] for row in rows)
    assert len(cases) >= 4
    for case in cases:
        values = {
            r["contender"]: f"{r['speedup_over_reference']:.2f}" for r in rows if r["case"] == case
        }
        assert f"| `{case}` | {' | '.join(values.get(name, '') for name in columns)} |" in page


def test_errors_and_memory_of_the_page_are_those_of_the_rows(page: str) -> None:
    errors = [
        r for r in _finished("accuracy") if r["case"] == "small-logps-n512-bf16-peaked-trained"
    ]
    for row in errors:
        e = row["error"]
        line = f"| {row['contender']} | {e['sequence']:.1e} | {e['dh']:.1e} | {e['dw']:.1e} |"
        assert line in page
        assert row["deterministic"]
    of = {row["contender"]: row["error"]["sequence"] for row in errors}
    assert of["fastdaa-recompute"] < 1e-3 < of["trl"]
    memory = [
        row
        for row in _finished("memory")
        if row["case"] == "small-dpo-n512-fp32-peaked-trained-online"
        and row["contender"] in CONTENDERS
        and row["peak_bytes"] is not None
    ]
    assert len(memory) >= 6
    for row in memory:
        assert f"| {row['contender']} | {row['peak_bytes'] / 2**20:.1f} |" in page


def test_the_page_names_device_versions_and_commit(page: str) -> None:
    for kind in ("head", "loss", "memory", "accuracy"):
        for row in read_rows(RESULTS / f"{kind}_cpu.jsonl"):
            assert row["status"] not in ("wrong", "failed")
            machine = row["machine"]
            assert machine["torch"] in page and machine["commit"] in page and not machine["dirty"]


def test_the_page_of_drop_ins_has_the_measured_times() -> None:
    page = (ROOT / "docs" / "drop_in.md").read_text(encoding="utf-8")
    rows = [
        json.loads(line)
        for line in (RESULTS / "trl_trainers" / "cpu.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 8
    for row in rows:
        times = row["median_s"]
        cells = f"{times['fastdaa']:.2f} | {times['trl']:.2f} |"
        (line,) = (line for line in page.splitlines() if line.startswith(f"| `{row['case']}` |"))
        assert line.endswith(cells), (line, cells)
        assert row["commit"] in page and not row["dirty"]
