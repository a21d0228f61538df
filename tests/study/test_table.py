"""The table of a study: what is read, what is refused, and what is written."""

from __future__ import annotations

import errno
import json
import math
import os

import numpy as np
import pytest

from fastdaa.study.curves import finals
from fastdaa.study.table import Table, append_rows, read_table, write_table

ROW = {"run": "a", "checkpoint": 10, "kl": 0.25, "score": 1.5}


def row(**changes):
    return {**ROW, **changes}


def lines(tmp_path, *rows, name="points.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    return path


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [row(loss="dpo", final=True, note="kept", beta=None), row(checkpoint=20, seed=1)]
    write_table(tmp_path / "points.jsonl", rows)
    assert list(read_table(tmp_path / "points.jsonl")) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["points.jsonl"]


def test_csv_cells_get_their_types(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text(
        "run,checkpoint,kl,score,loss,size,final,beta,reward_name\n"
        "7,0,0,0.5,dpo,6.9,true,,7b\n"
        "7,100,2.5e-1,-1,dpo,6.9,0,0.1,\n"
    )
    first, second = read_table(path)
    assert first == {
        "run": "7", "checkpoint": 0, "kl": 0.0, "score": 0.5, "loss": "dpo", "size": "6.9",
        "final": True, "beta": None, "reward_name": "7b",
    }  # fmt: skip
    assert second["kl"] == 0.25 and second["final"] is False and second["reward_name"] is None


def test_names_of_csv_columns_are_taken_without_blanks_and_once(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("run, checkpoint, kl, score\na, 0, 0.5, 1\n")
    assert list(read_table(path)) == [{"run": "a", "checkpoint": 0, "kl": 0.5, "score": 1}]
    path.write_text("run,checkpoint,kl,score,score \na,0,0.5,1,2\n")
    with pytest.raises(ValueError, match=r"csv:1: expected every column once, got 'score' again"):
        read_table(path)


def test_columns_can_have_other_names(tmp_path):
    path = lines(tmp_path, {"name": 3, "step": 5, "objective/kl": 1, "reward": 2})
    columns = {"run": "name", "checkpoint": "step", "kl": "objective/kl", "score": "reward"}
    (only,) = read_table(path, columns=columns)
    assert (only["run"], only["checkpoint"], only["kl"], only["score"]) == ("3", 5, 1.0, 2.0)
    assert only["reward"] == 2


def test_a_renamed_column_replaces_one_of_that_name(tmp_path):
    (only,) = read_table(lines(tmp_path, row(gold=9.0)), columns={"score": "gold"})
    assert only["score"] == only["gold"] == 9.0


REFUSED = {
    "no kl": (lambda: {k: v for k, v in ROW.items() if k != "kl"}, "expected a value for kl"),
    "null score": (lambda: row(score=None), "expected a value for score"),
    "nan": (lambda: row(score=math.nan), "expected score to be finite, got nan"),
    "infinite extra": (lambda: row(reward=math.inf), "expected reward to be finite or null"),
    "text": (lambda: row(kl="high"), "expected kl to be a number, got 'high'"),
    "bool": (lambda: row(score=True), "expected score to be a number, got True"),
    "optional text": (lambda: row(beta="0.1"), "expected beta to be a number, got '0.1'"),
    "negative kl": (lambda: row(kl=-0.02), "expected kl .* at least 0.*got -0.02"),
    "half a step": (lambda: row(checkpoint=1.5), "expected checkpoint to be a whole number"),
    "run is a list": (lambda: row(run=["a"]), "expected run to be text"),
    "empty run": (lambda: row(run=""), "expected run to be text, got ''"),
    "final": (lambda: row(final="yes"), "expected final to be true or false, got 'yes'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_broken_rows_are_refused_with_their_line(tmp_path, case):
    make, message = REFUSED[case]
    path = lines(tmp_path, row(run="first"), make())
    with pytest.raises(ValueError, match=message) as error:
        read_table(path)
    assert str(error.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("case", REFUSED)
def test_broken_rows_are_not_written(tmp_path, case):
    make, message = REFUSED[case]
    path = lines(tmp_path, row(run="first"))
    before = path.read_bytes()
    for write in (append_rows, write_table):
        with pytest.raises(ValueError, match=message):
            write(path, [row(), make()])
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"kl": -0.005}, True),
        ({"kl": -0.3, "kl_k1_stderr": 0.1}, True),
        ({"kl": -0.5, "kl_k1_stderr": 0.1}, False),
    ],
    ids=["within the tolerance", "within four standard errors", "beyond them"],
)
def test_estimates_of_kl_may_lie_a_little_below_zero(tmp_path, changes, fits):
    path = lines(tmp_path, row(**changes))
    if fits:
        assert read_table(path)[0]["kl"] == changes["kl"]
    else:
        with pytest.raises(ValueError, match="expected kl"):
            read_table(path)


FILES = {
    "empty": ("points.jsonl", "", "expected at least one row, got an empty table"),
    "only a header": ("points.csv", "run,checkpoint,kl,score\n", "got an empty table"),
    "not json": ("points.jsonl", "{run: a}\n", "points.jsonl:1: expected one JSON object"),
    "a list": ("points.jsonl", "[1]\n", "expected a JSON object, got list"),
    "short csv row": ("p.csv", "run,checkpoint,kl,score\na,1,2\n", ":2: expected 4 cells"),
    "long csv row": ("p.csv", "run,checkpoint,kl,score\na,1,2,3,4\n", ":2: expected 4 cells"),
    "text in csv": ("p.csv", "run,checkpoint,kl,score\na,1,much,3\n", "kl to be a number"),
    "another kind": ("points.parquet", "PAR1", "expected a .jsonl or .csv file"),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_files_are_refused(tmp_path, case):
    name, content, message = FILES[case]
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_missing_files_and_columns_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an existing"):
        read_table(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="expected a column objective/kl, got the columns run, ch"):
        read_table(lines(tmp_path, ROW), columns={"kl": "objective/kl"})


def test_the_same_run_and_checkpoint_twice(tmp_path):
    one, two = lines(tmp_path, ROW), lines(tmp_path, row(score=2.0), name="resumed.jsonl")
    with pytest.raises(ValueError, match=r"resumed.jsonl:1: .*'a' checkpoint 10 again.*points.js"):
        read_table([one, two])
    assert [entry["score"] for entry in read_table([one, two], duplicates="last")] == [2.0]
    with pytest.raises(ValueError, match="duplicates: expected one of"):
        read_table(one, duplicates="first")


@pytest.mark.parametrize(
    ("tail", "left"),
    [('{"run": "b", "chec', ["a", "c"]), (json.dumps(row(run="b")), ["a", "b", "c"])],
    ids=["cut off", "whole without a line end"],
)
def test_appending_after_an_interruption(tmp_path, tail, left):
    path = lines(tmp_path, ROW)
    with path.open("a") as file:
        file.write(tail)
    append_rows(path, [row(run="c")])
    assert [entry["run"] for entry in read_table(path)] == left


def test_half_a_row_at_the_end_is_left_out(tmp_path, capsys):
    path = lines(tmp_path, ROW)
    with path.open("a") as file:
        file.write('{"run": "b", "chec')
    assert [entry["run"] for entry in read_table(path)] == ["a"]
    assert capsys.readouterr().err == f"{path}:2: the file breaks off in this row; left out\n"


def test_a_disk_that_takes_a_part_of_a_line_is_full_and_named(tmp_path, monkeypatch):
    path, room, write = tmp_path / "rows.jsonl", [20], os.write

    def write_what_fits(descriptor, line):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(descriptor, line[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr("fastdaa.study.table.os.write", write_what_fits)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        append_rows(path, [ROW])
    monkeypatch.undo()
    append_rows(path, [ROW])
    assert list(read_table(path)) == [ROW]


def test_two_runs_of_one_name(tmp_path):
    for name in ("first", "second"):
        write_table(tmp_path / name / "track.jsonl", [row()])
    with pytest.raises(ValueError, match=r"again .*; two runs need names of their own"):
        read_table([tmp_path / "first", tmp_path / "second"])


def test_appending_makes_the_folder(tmp_path):
    append_rows(tmp_path / "new" / "rows.jsonl", [ROW])
    append_rows(tmp_path / "new" / "rows.jsonl", [row(run="b")])
    assert len(read_table(tmp_path / "new" / "rows.jsonl")) == 2


@pytest.fixture
def table():
    return Table(
        row(run=f"{loss}{seed}", checkpoint=checkpoint, loss=loss, seed=seed, kl=checkpoint / 10)
        for loss in ("ipo", "dpo")
        for seed in (1, 0)
        for checkpoint in (5, 10)
    )


def test_where(table):
    far = table.where(lambda entry: entry["kl"] > 0.5)
    assert [entry["run"] for entry in far] == ["ipo1", "ipo0", "dpo1", "dpo0"]
    assert {entry["kl"] for entry in far} == {1.0}


def test_by_is_sorted_and_keeps_every_row(table):
    groups = table.by("loss", "seed")
    assert list(groups) == [("dpo", 0), ("dpo", 1), ("ipo", 0), ("ipo", 1)]
    assert sum(map(len, groups.values())) == len(table)
    assert list(table.by()) == [()]
    with pytest.raises(ValueError, match=r"expected columns of the table .* got colour"):
        table.by("colour")


def test_by_puts_unknown_values_last():
    rows = Table([row(size=None), row(size=2.8), row(size="small"), row(size=1)])
    assert [key for (key,) in rows.by("size")] == [1, 2.8, "small", None]


def test_final_is_what_is_marked_else_the_highest_checkpoint(table):
    assert [entry["checkpoint"] for entry in table.final()] == [10] * 4
    marked = Table([row(checkpoint=5, final=True), row(checkpoint=10, final=False)])
    assert [entry["checkpoint"] for entry in marked.final()] == [5]
    continued = Table([row(checkpoint=5, final=True), row(checkpoint=10, final=True)])
    assert [entry["checkpoint"] for entry in continued.final()] == [10]
    # Figures and claims, which take any rows, look at the same ones.
    assert [entry["checkpoint"] for entry in finals(marked)] == [5]


def test_numbers_and_columns():
    rows = Table([row(gold=1.0), row(gold=None, other="x")])
    np.testing.assert_array_equal(rows.numbers("gold"), [1.0, np.nan])
    assert rows.columns == ["run", "checkpoint", "kl", "score", "gold", "other"]
    with pytest.raises(ValueError, match="other of run a: expected numbers, got 'x'"):
        rows.numbers("other")


def test_a_list_of_objects_and_tabs(tmp_path):
    path = tmp_path / "points.json"
    path.write_text(json.dumps([row(), row(checkpoint=20)], indent=1))
    assert [entry["checkpoint"] for entry in read_table(path)] == [10, 20]
    (tmp_path / "points.tsv").write_text("run\tcheckpoint\tkl\tscore\na\t10\t0.25\t1.5\n")
    assert list(read_table(tmp_path / "points.tsv")) == [ROW]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"run": 1},', "points.json: expected a list of JSON objects"),
        ("[1]", "points.json: row 1"),
    ],
    ids=["broken", "numbers"],
)
def test_broken_lists_are_refused(tmp_path, content, message):
    (tmp_path / "points.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "points.json")


def test_columns_of_other_names_are_told(tmp_path):
    path = lines(tmp_path, {"name": "a", "step": 1})
    with pytest.raises(ValueError, match=r"a value for run .* got the columns name, step"):
        read_table(path)


@pytest.mark.parametrize("name", ["points.jsonl", "track.jsonl"])
def test_a_folder_is_read_by_its_table(tmp_path, name):
    lines(tmp_path, ROW, name=name)
    assert list(read_table(tmp_path)) == [ROW]


def test_a_folder_without_a_table(tmp_path):
    lines(tmp_path, {"step": 1, "loss": 2.0}, name="metrics.jsonl")
    with pytest.raises(
        FileNotFoundError, match=r"expected points.jsonl or track.jsonl, or a run of"
    ):
        read_table(tmp_path)


@pytest.mark.parametrize("name", ["points.csv", "points.jsonl"])
def test_a_file_that_is_no_text_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=rf"{name}: expected UTF-8 text"):
        read_table(tmp_path / name)
