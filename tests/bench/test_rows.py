"""Rows: what a line holds, who is who, and a run that goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdaa.benchmarks.rows import RowFile, append_rows, make_row, read_rows, row_key

MACHINE = {"device": "a CPU", "commit": "abc", "changes": None, "torch": "2.13.0"}


def row(contender: str = "pytorch", status: str = "ok", **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "case_params": {"N": 512, "entropy": 1.5}, "version": "1", "machine": MACHINE, "seed": 0,
        "threads": 1, "command": "fastdaa bench head",
    }  # fmt: skip
    return make_row("head", "a-case", contender, status, **{**values, **changes})


def test_every_field_is_there() -> None:
    made = row(seconds={"median": 1.0})
    assert made["seconds"] == {"median": 1.0}
    assert made["peak_bytes"] is None and made["speedup_over_reference"] is None
    assert made["time"].endswith("+00:00")


def test_a_wrong_row_has_no_speed_up() -> None:
    with pytest.raises(ValueError, match="expected None for status 'wrong'"):
        row(status="wrong", speedup_over_reference=2.0)


@pytest.mark.parametrize(
    ("kind", "status"), [("heads", "ok"), ("head", "fine")], ids=["kind", "status"]
)
def test_unknown_words_are_refused(kind: str, status: str) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        make_row(kind, "a", "b", status, case_params={}, version="1", machine={}, seed=0, threads=1,
                 command="")  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"contender": "trl"}, {"version": "2"}, {"seed": 1}, {"threads": 2},
        {"settings": {"repeats": 3}}, {"case_params": {"N": 1024}},
        {"machine": {**MACHINE, "commit": "abd"}}, {"machine": {**MACHINE, "changes": "f00"}},
        {"machine": {**MACHINE, "device": "a GPU"}},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_what_makes_a_row_another_one(changes: dict[str, Any]) -> None:
    assert row_key(row(**changes)) != row_key(row())


def test_results_do_not_make_a_row_another_one() -> None:
    other = row(status="wrong", seconds={"median": 2.0}, case_params={"N": 512, "entropy": None})
    assert row_key(other) == row_key(row())


def test_written_rows_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "below" / "rows.jsonl"
    append_rows(path, [row(), row("trl")])
    append_rows(path, [row("cce", "wrong", error={"logps": float("nan"), "limit": None})])
    rows = read_rows(path)
    assert [r["contender"] for r in rows] == ["pytorch", "trl", "cce"]
    assert rows[2]["error"]["logps"] == "nan"
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "head"}'], ids=["cut", "list", "fields"])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: expected a JSON object"):
        read_rows(path)


def test_finished_rows_are_found_and_failed_ones_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    RowFile(path).append([row(), row("trl", "failed"), row("cce", "wrong"), row("quack", "absent")])
    again = RowFile(path)
    assert again.find(row()) is not None and again.find(row("cce")) is not None
    assert again.find(row("trl")) is None and again.find(row("quack")) is None


def test_absence_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for _ in range(2):
        RowFile(path).append([row("quack", "absent", reason="not installed")])
    assert len(read_rows(path)) == 1


def test_fresh_moves_the_old_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for _ in range(3):
        RowFile(path, fresh=True).append([row()])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "rows.jsonl", "rows.jsonl.1", "rows.jsonl.2",
    ]  # fmt: skip
    assert len(read_rows(path)) == 1
