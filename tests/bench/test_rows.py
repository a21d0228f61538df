"""Rows: what a line holds, who is who, and a run that goes on where it stopped."""

from __future__ import annotations

import json
import subprocess
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
        {"machine": {**MACHINE, "device": "a GPU"}}, {"machine": {**MACHINE, "torch": "2.14.0"}},
        {"machine": {**MACHINE, "triton": "3.6.0"}}, {"machine": {**MACHINE, "driver": "570"}},
        {"machine": {**MACHINE, "transformers": "5.0.0"}},
        {"machine": {**MACHINE, "accelerate": "1.0.0"}},
    ],
    ids=lambda changes: "-".join(changes if "machine" not in changes else (
        name for name, value in changes["machine"].items() if MACHINE.get(name) != value
    )),
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


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", '{"kind": "head"}',
        '{"kind": "compare", "case": "a", "contender": "b", "status": "ok"}',
        '{"kind": "head", "case": "a", "contender": "b", "status": "ok", "seconds": 0.1}',
    ],
    ids=["cut", "list", "fields", "comparison", "a number of seconds"],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n\n" + line + "\n")
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:3: expected a JSON object.*delete that line"
    ):
        read_rows(path)


def test_half_a_row_at_the_end_is_left_out_and_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row(), row("trl"), row("cce")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert [r["contender"] for r in read_rows(path)] == ["pytorch", "trl"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "rows.jsonl:3: the file breaks off" in said
    again = RowFile(path)
    assert again.find(row("trl")) is not None and again.find(row("cce")) is None
    again.append([row("cce")])
    capsys.readouterr()
    assert [r["contender"] for r in read_rows(path)] == ["pytorch", "trl", "cce"]
    assert path.read_bytes().count(b"\n") == 3 and capsys.readouterr().err == ""


def test_only_the_end_of_the_last_line_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row(), row("trl")])
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert len(read_rows(path)) == 2
    append_rows(path, [row("cce")])
    assert [r["contender"] for r in read_rows(path)] == ["pytorch", "trl", "cce"]


def test_another_kind_of_file_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("what I saw")
    with pytest.raises(ValueError, match="notes:1: expected a JSON object"):
        RowFile(path)
    assert path.read_text() == "what I saw"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a file of rows, got .*no\.jsonl, which"):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match="expected a file of rows, got the folder"):
        read_rows(tmp_path)


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


def test_a_file_that_cannot_be_written_is_found_out_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, words in ((tmp_path / "file" / "rows.jsonl", "can be written"), (tmp_path, "folder")):
        with pytest.raises(ValueError, match=f"--output: expected a file.*{words}"):
            RowFile(path)


def test_fresh_moves_the_old_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for _ in range(3):
        RowFile(path, fresh=True).append([row()])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "rows.jsonl", "rows.jsonl.1", "rows.jsonl.2",
    ]  # fmt: skip
    assert len(read_rows(path)) == 1


def test_without_git_the_sources_tell_code_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from importlib.machinery import ModuleSpec

    from fastdaa.benchmarks import machine

    def no_git(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    (tmp_path / "a.py").write_text("a = 1", encoding="utf-8")
    monkeypatch.setattr(machine.subprocess, "run", no_git)
    spec = ModuleSpec("fastdaa", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(machine, "find_spec", lambda name: spec)
    machine._commit.cache_clear()
    first = machine._commit()
    assert first == machine._commit.__wrapped__() and first[1] is None
    assert first[0].startswith("no git, sources ")
    (tmp_path / "a.py").write_text("a = 2", encoding="utf-8")
    assert machine._commit.__wrapped__() != first
    machine._commit.cache_clear()


def test_code_that_git_does_not_know_yet_is_other_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows of an older state of a new module would be taken for those of the present one."""
    from importlib.machinery import ModuleSpec

    from fastdaa.benchmarks import machine

    for name in ("fastdaa/a.py", "benchmarks/machine.py", "docs/page.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1", encoding="utf-8")
    me = ("-c", "user.name=a", "-c", "user.email=b@c")
    for words in (("init", "-q"), ("add", "."), (*me, "commit", "-qm", "first")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    spec = ModuleSpec("fastdaa", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "fastdaa")]
    monkeypatch.setattr(machine, "find_spec", lambda name: spec)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "benchmarks" / "machine.py"))
    commit = machine._commit.__wrapped__
    (tmp_path / "docs" / "page.md").write_text("2", encoding="utf-8")
    (tmp_path / "benchmarks" / "rows.jsonl").write_text("{}", encoding="utf-8")
    assert commit()[1] is None
    (tmp_path / "fastdaa" / "b.py").write_text("1", encoding="utf-8")
    first = commit()[1]
    (tmp_path / "fastdaa" / "b.py").write_text("2", encoding="utf-8")
    second = commit()[1]
    assert first and second and first != second
