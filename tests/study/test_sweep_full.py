"""The whole study: its steps in order, what is skipped, what is told; and its command line."""

from __future__ import annotations

import errno
import json

import pytest
from rich.console import Console

from fastdaa.cli import main
from fastdaa.study import estimators, pool, tilt
from fastdaa.study.full import STUDY_FILE, Step, all_steps, run_full
from fastdaa.study.plan import grid


def steps_that_count(calls, *, settings=None, fails=()):
    def work(name):
        def run(study):
            calls.append(name)
            if name in fails:
                raise RuntimeError(f"{name} went\nwrong")
            (study.output / f"{name}.json").parent.mkdir(parents=True, exist_ok=True)
            (study.output / f"{name}.json").write_text("{}")
            return f"{name} is done"

        return run

    return [
        Step(name, f"the {name}", (f"{name}.json",), work(name), lambda study: settings or {},
             always=name == "page")
        for name in ("tree", "tilt", "page")
    ]  # fmt: skip


def test_steps_run_in_order_and_once(tmp_path):
    calls = []
    steps = steps_that_count(calls)
    console = Console(record=True, width=100)
    run_full(tmp_path, runs=[], steps=steps, workers=1, console=console)
    assert calls == ["tree", "tilt", "page"]
    record = run_full(tmp_path, runs=[], steps=steps, workers=1, console=console)
    # The page reads what the others left, so it is made every time.
    assert calls == ["tree", "tilt", "page", "page"]
    text = console.export_text()
    assert "[1/3] the tree: done before" in text and "tilt is done" in text
    assert json.loads((tmp_path / STUDY_FILE).read_text()) == record
    assert record["failed"] == {} and record["workers"] == 1
    assert record["steps"]["tilt"]["result"] == "tilt is done"
    assert record["seconds"] == sum(step["seconds"] for step in record["steps"].values())
    assert {"torch", "transformers", "fastdaa", "python"} <= set(record["versions"])


@pytest.mark.parametrize("change", ["settings", "file"])
def test_a_step_is_done_again_if_something_changed(tmp_path, change):
    calls = []
    run_full(tmp_path, runs=[], steps=steps_that_count(calls), workers=1)
    if change == "file":
        (tmp_path / "tilt.json").unlink()
    settings = {"seeds": [0, 1]} if change == "settings" else None
    run_full(tmp_path, runs=[], steps=steps_that_count(calls, settings=settings), workers=1)
    again = ["tree", "tilt", "page"] if change == "settings" else ["tilt", "page"]
    assert calls[3:] == again


def test_a_step_that_fails_is_told_and_the_others_go_on(tmp_path):
    calls = []
    record = run_full(tmp_path, runs=[], steps=steps_that_count(calls, fails=("tilt",)), workers=1)
    assert calls == ["tree", "tilt", "page"]
    assert record["failed"] == {"tilt": "RuntimeError: tilt went wrong"}
    run_full(tmp_path, runs=[], steps=steps_that_count(calls), workers=1)
    assert calls[3:] == ["tilt", "page"]


def test_ctrl_c_keeps_the_steps_before(tmp_path):
    def stop(study):
        raise KeyboardInterrupt

    calls = []
    first, second, third = steps_that_count(calls)
    with pytest.raises(KeyboardInterrupt):
        run_full(tmp_path, runs=[], steps=[first, second._replace(work=stop), third], workers=1)
    run_full(tmp_path, runs=[], steps=[first, second, third], workers=1)
    assert calls == ["tree", "tilt", "page"]


def test_the_steps_are_the_experiments():
    names = [step.name for step in all_steps()]
    assert names == ["tree", "tilt", "estimators", "sweep", "fit", "correlate", "report"]


def test_other_settings_stop_before_anything_is_done(tmp_path):
    (run,) = grid(("H",), ("dpo",), (0.1,))
    done = tmp_path / "runs" / run.id / "done.json"
    done.parent.mkdir(parents=True)
    done.write_text(json.dumps({"fingerprint": "x", "settings": run.settings() | {"beta": 0.3}}))
    calls = []
    with pytest.raises(ValueError, match=r"run H-dpo-b0\.1-s0-d32: .*beta 0\.3 then, 0\.1 now"):
        run_full(tmp_path, runs=[run], steps=steps_that_count(calls), workers=1)
    assert calls == [] and not (tmp_path / STUDY_FILE).exists()


def test_a_broken_study_file_is_told(tmp_path):
    (tmp_path / STUDY_FILE).write_text('{"steps": {')
    with pytest.raises(ValueError, match=r"study\.json: expected a JSON object"):
        run_full(tmp_path, runs=[], steps=[], workers=1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sweep", "--presets", "Z"], "preset: expected one of H, M, got 'Z'"),
        (["sweep", "--losses", "ppo"], "loss: expected one of"),
        (["sweep", "--betas", "-1"], "beta"),
        (["sweep", "--workers", "0"], "workers: expected at least 1, got 0"),
        (["full", "--workers", "-2"], "workers: expected at least 1, got -2"),
        (["full", "--seeds", "-1"], "seed: expected 0 or more, got -1"),
    ],
    ids=["preset", "loss", "beta", "workers", "full-workers", "full-seeds"],
)
def test_mistakes_are_one_line(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdaa study: error: ") and error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_dry_run_lists_and_does_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [
        "study",
        "sweep",
        "--dry_run",
        "--losses",
        "rdpo",
        "--betas",
        "0.1",
        "--seeds",
        "0",
        "1",
    ]
    assert main(argv) == 0
    assert capsys.readouterr().out.split() == [
        "H-rdpo-b0.1-s0-d32-a0.1",
        "H-rdpo-b0.1-s1-d32-a0.1",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["--help"], ["sweep", "--help"], ["full", "--help"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as end:
        main(["study", *argv])
    assert end.value.code == 0
    text = capsys.readouterr().out
    if argv == ["--help"]:
        assert "sweep" in text and "full" in text
    else:
        assert "--output_dir" in text and "--workers" in text


@pytest.mark.parametrize("action", ["sweep", "online"])
def test_a_dry_run_checks_the_workers_too(action, tmp_path, capsys):
    arguments = ["study", action, "--dry_run", "--workers", "0", "--output_dir", str(tmp_path)]
    assert main(arguments) == 2
    assert "workers: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["sweep"], ["full"], ["online"], ["estimators"], ["world"]], ids=" ".join
)
def test_a_folder_that_cannot_be_written_is_found_before_any_work(
    argv, tmp_path, capsys, monkeypatch
):
    for module, name in ((pool, "_attempt"), (estimators, "make_reference"), (tilt, "make_world")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("work was begun"))
    _make_read_only(monkeypatch)
    assert main(["study", *argv, "--output_dir", str(tmp_path / "study")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"output_dir: expected a folder to write to, {tmp_path}/study cannot be" in error
    assert error.endswith("Read-only file system")


def _make_read_only(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("fastdaa.writable.tempfile.mkdtemp", refuse)


def test_a_tree_whose_file_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastdaa.study.exact.run_exact", lambda *_: pytest.fail("work was begun"))
    _make_read_only(monkeypatch)
    assert main(["study", "tree", "--output", str(tmp_path / "tree.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
