"""``--compare``: a slowdown is seen, noise is not, and nothing is left behind."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from fastdaa.benchmarks.compare import turns, versions
from fastdaa.benchmarks.compare.ratio import Ratio, ratio_of
from fastdaa.benchmarks.compare.result import Comparison, chancy

ROOT = Path(__file__).resolve().parents[2]
# A project of the same shape as this one, whose calls say how long they would like to have taken:
# a busy machine must not fail these tests.
TOY_JOBS = """
import random
import time

class Absent(Exception):
    pass

def comparison_jobs(options):
    names = options.contenders or ["waits"]
    return [{"case": "toy", "contender": name, "seed": options.seed} for name in names]

def open_job(job):
    print("chatter that must not reach the protocol")
    if job["contender"] == "old":
        from fastdaa.speed import newest_name
    from fastdaa.speed import RIGHT, SECONDS, SLEEP
    if job["contender"] == "missing":
        raise Absent("not here")
    if job["contender"] == "dies":
        import os
        os._exit(7)

    noise = random.Random(0)

    def call():
        time.sleep(SLEEP)
        seconds = SECONDS * noise.uniform(0.99, 1.01)
        return {"seconds": seconds, "peak_bytes": 1000, "status": "ok" if RIGHT else "wrong",
                "reason": None if RIGHT else "dh: error 0.5 above 0.01"}

    return call
"""


def git(root: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *words], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def speed(
    root: Path, seconds: float, right: bool = True, sleep: float = 0.0, extra: str = ""
) -> None:
    text = f"SECONDS = {seconds}\nRIGHT = {right}\nSLEEP = {sleep}\n{extra}"
    (root / "fastdaa" / "speed.py").write_text(text, encoding="utf-8")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit that says 10 ms a call."""
    root = tmp_path / "toy"
    (root / "fastdaa").mkdir(parents=True)
    (root / "benchmarks" / "compare").mkdir(parents=True)
    (root / "fastdaa" / "__init__.py").write_text("", encoding="utf-8")
    (root / "fastdaa" / "benchmarks").symlink_to("../benchmarks")
    (root / ".gitignore").write_text("__pycache__\n", encoding="utf-8")
    shutil.copy(ROOT / "benchmarks" / "compare" / "worker.py", root / "benchmarks" / "compare")
    (root / "benchmarks" / "toy_jobs.py").write_text(TOY_JOBS, encoding="utf-8")
    speed(root, 0.010)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setitem(turns.JOBS, "toy", "fastdaa.benchmarks.toy_jobs")
    # The parent asks its own tree which jobs there are.
    spec = importlib.util.spec_from_file_location(
        "fastdaa.benchmarks.toy_jobs", root / "benchmarks" / "toy_jobs.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "fastdaa.benchmarks.toy_jobs", module)
    return root


def options(refs: str, **changes: object) -> argparse.Namespace:
    values = {
        "compare": refs,
        "contenders": None,
        "seed": 0,
        "threads": 1,
        "device": "cpu",
        "repeats": 3,
        "launches": 2,
        "threshold": 0.05,
        "output": None,
        "fresh": False,
        "command": "fastdaa bench toy --compare",
    }
    return argparse.Namespace(**{**values, **changes})


def test_a_verdict_from_few_rounds_says_so(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three rounds of one launch: equal versions would be called different once in four times."""
    speed(toy, 0.015)
    output = tmp_path / "rows.jsonl"
    output.write_text("", encoding="utf-8")
    asked = options("HEAD", output=output, launches=1, fresh=True)
    assert turns.run("toy", asked, toy) == 1
    assert "a verdict may be chance" in capsys.readouterr().out
    assert (tmp_path / "rows.jsonl.1").exists(), "--fresh is for comparisons, too"


def test_enough_rounds_need_no_warning() -> None:
    result = Comparison("toy", {"case": "a", "contender": "b"}, "old", "new")
    for launch in range(3):
        result.start_launch()
        for _ in range(5):
            result.add_round([{"seconds": 1.0, "peak_bytes": None}] * 2)
        assert chancy([result]) == (launch < 2)


def test_an_output_that_cannot_be_written_costs_no_measurement(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="--output: expected a file that can be written"):
        turns.run("toy", options("HEAD", output=tmp_path / "file" / "rows.jsonl"), toy)


def row_of(path: Path) -> dict:
    (line,) = path.read_text(encoding="utf-8").splitlines()
    return json.loads(line)


def test_shows_a_slowdown(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed(toy, 0.015)
    output = tmp_path / "rows.jsonl"
    assert turns.run("toy", options("HEAD", output=output), toy) == 1
    row = row_of(output)
    assert row["verdict"] == "slower"
    assert 1.45 < row["ratio"] < 1.55
    assert 1.0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["rounds"] == [3, 3]
    assert row["base"].startswith("HEAD (") and row["new"].endswith("+)")
    assert "slower" in capsys.readouterr().out


def test_shows_a_speedup_between_two_commits(toy: Path, tmp_path: Path) -> None:
    speed(toy, 0.006)
    git(toy, "commit", "--quiet", "-am", "faster")
    # What the working tree holds does not matter for A..B.
    speed(toy, 0.1)
    output = tmp_path / "rows.jsonl"
    assert turns.run("toy", options("HEAD~1..HEAD", output=output), toy) == 0
    assert row_of(output)["verdict"] == "faster"


def test_the_same_code_is_the_same(toy: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    assert turns.run("toy", options("HEAD", output=output), toy) == 0
    assert row_of(output)["verdict"] == "same"


def test_a_wrong_result_has_no_ratio(toy: Path, tmp_path: Path) -> None:
    speed(toy, 0.002, right=False)
    output = tmp_path / "rows.jsonl"
    assert turns.run("toy", options("HEAD", output=output), toy) == 1
    row = row_of(output)
    assert (row["verdict"], row["ratio"]) == ("WRONG", None)
    assert "dh: error 0.5" in row["reason"]


@pytest.mark.parametrize(
    ("contender", "verdict", "reason"),
    [
        ("missing", "absent", "HEAD (.*not here"),
        ("old", "absent", "HEAD (.*newest_name"),
        ("dies", "failed", "the process ended with 7"),
    ],
)
def test_what_cannot_run_is_listed(
    toy: Path, tmp_path: Path, contender: str, verdict: str, reason: str
) -> None:
    speed(toy, 0.010, extra="newest_name = 1\n")
    output = tmp_path / "rows.jsonl"
    code = turns.run("toy", options("HEAD", output=output, contenders=[contender]), toy)
    assert code == 1, "nothing was compared"
    row = row_of(output)
    assert row["verdict"] == verdict
    assert all(part in row["reason"] for part in reason.split(".*"))


def test_leaves_nothing_behind(toy: Path, tmp_path: Path) -> None:
    before = git(toy, "status", "--porcelain", "--ignored"), git(toy, "rev-parse", "HEAD")
    turns.run("toy", options("HEAD", launches=1, repeats=1, threshold=0.9), toy)
    status = git(toy, "status", "--porcelain", "--ignored")
    assert [line for line in status.splitlines() if "__pycache__" not in line] == []
    assert git(toy, "rev-parse", "HEAD") == before[1]
    assert git(toy, "worktree", "list").count("\n") == 0
    assert list((tmp_path / "scratch").iterdir()) == []


def test_interruption_keeps_rounds_and_cleans_up(toy: Path, tmp_path: Path) -> None:
    """A real Ctrl-C, sent to the parent in the middle of the second launch."""
    output, marks = tmp_path / "rows.jsonl", tmp_path / "marks"
    speed(toy, 0.01, sleep=0.05)
    code = f"""if True:
        import argparse, importlib.util, pathlib, sys, tempfile
        from fastdaa.benchmarks.compare import turns
        sys.path.append({str(toy / "benchmarks")!r})
        turns.JOBS["toy"] = "fastdaa.benchmarks.toy_jobs"
        sys.modules["fastdaa.benchmarks.toy_jobs"] = __import__("toy_jobs")
        inner = turns._measure
        def measure(*arguments):
            inner(*arguments)
            pathlib.Path({str(marks)!r}).write_text("one launch is done")
        turns._measure = measure
        options = argparse.Namespace(**{vars(options("HEAD", launches=500)) | {"output": None}!r})
        options.output = pathlib.Path({str(output)!r})
        sys.exit(turns.run("toy", options, pathlib.Path({str(toy)!r})))
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch"), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not marks.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=180)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert row_of(output)["ratio"] is not None
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("ref", ["no-such-branch", "", "--all", "HEAD..nowhere"])
def test_unknown_ref(toy: Path, ref: str) -> None:
    with pytest.raises(ValueError, match="expected a commit, branch or tag"):
        turns.run("toy", options(ref), toy)


def test_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site" / "fastdaa" / "benchmarks" / "compare" / "versions.py"
    monkeypatch.setattr(versions, "__file__", str(installed))
    installed.parent.mkdir(parents=True)
    with pytest.raises(ValueError, match="expected --compare in a git checkout"):
        versions.checkout()


def test_an_install_inside_another_repository_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / ".venv" / "site"
    (site / "fastdaa" / "benchmarks").mkdir(parents=True)
    (site / "fastdaa" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / ".gitignore").write_text(".venv\n", encoding="utf-8")
    git(tmp_path, "init", "--quiet")
    monkeypatch.setattr(
        versions, "__file__", str(site / "fastdaa" / "benchmarks" / "compare" / "versions.py")
    )
    with pytest.raises(ValueError, match="expected --compare in a git checkout"):
        versions.checkout()


def test_only_kinds_that_have_jobs() -> None:
    with pytest.raises(ValueError, match="expected --compare with head, loss, step"):
        turns.run("accuracy", options("HEAD"))


def test_ratio_by_hand() -> None:
    """Twice the time in every round: no spread, so no interval."""
    assert ratio_of([[1.0, 2.0], [4.0]], [[2.0, 4.0], [8.0]]) == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        ((1.10, 1.02, 1.20), "slower"),
        ((1.10, 0.99, 1.20), "same"),
        ((1.03, 1.02, 1.04), "same"),
        ((0.90, 0.85, 0.95), "faster"),
        ((0.90, 0.85, 1.01), "same"),
        ((0.97, 0.96, 0.98), "same"),
    ],
)
def test_verdict(ratio: tuple[float, float, float], verdict: str) -> None:
    assert Ratio(*ratio).verdict(0.05) == verdict


@pytest.mark.parametrize(("slowdown", "certain"), [(1.0, 0), (1.2, 38)])
def test_how_often_the_verdict_is_slower(slowdown: float, certain: int) -> None:
    """Of 40 simulated comparisons: 2 % of noise a launch and 3 % a round."""
    generator = np.random.default_rng(0)

    def times(mean: float) -> list[list[float]]:
        return [
            list(mean * np.exp(generator.normal(0, 0.02) + generator.normal(0, 0.03, 7)))
            for _ in range(4)
        ]

    verdicts = [ratio_of(times(1.0), times(slowdown)).verdict(0.05) for _ in range(40)]
    assert verdicts.count("slower") >= certain
    assert certain or verdicts.count("slower") <= 2


def test_unequal_rounds_are_an_error() -> None:
    with pytest.raises(ValueError, match="as many rounds"):
        ratio_of([[1.0]], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="at least one round"):
        ratio_of([[]], [[]])


def test_peaks_of_both_sides_are_kept() -> None:
    result = Comparison("head", {"case": "c", "contender": "x"}, "a", "b")
    result.start_launch()
    result.add_round([{"seconds": 1.0, "peak_bytes": None}, {"seconds": 1.0, "peak_bytes": 5}])
    result.add_round([{"seconds": 1.0, "peak_bytes": None}, {"seconds": 1.0, "peak_bytes": 7}])
    assert result.peaks == [None, 7]


@pytest.mark.slow
def test_a_slowed_head_is_caught_end_to_end(tmp_path: Path) -> None:
    """The real command on a clone of this project whose head waits 20 ms more than its commit."""
    clone = tmp_path / "clone"
    ignore = shutil.ignore_patterns("__pycache__", "results", "kernels", "benchmarks")
    shutil.copytree(ROOT / "fastdaa", clone / "fastdaa", ignore=ignore)
    for folder in ("kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
        (clone / "fastdaa" / folder).symlink_to(f"../{folder}")
    (clone / ".gitignore").write_text("__pycache__\n", encoding="utf-8")
    git(clone, "init", "--quiet")
    git(clone, "add", ".")
    git(clone, "commit", "--quiet", "-m", "as it is")
    with (clone / "fastdaa" / "logps.py").open("a", encoding="utf-8") as file:
        file.write(
            "\n\n_quick = head_logps\n\n\ndef head_logps(*args, **options):\n"
            "    import time\n\n    time.sleep(0.02)\n    return _quick(*args, **options)\n"
        )
    output = tmp_path / "rows.jsonl"
    words = "bench head --compare HEAD --device cpu --threads 1 --repeats 3 --launches 2"
    code = f"""if True:
        import sys
        from fastdaa.benchmarks import cases
        from fastdaa.cli import main
        cases.SELECTIONS["head"]["quick"] = [cases.Case("tiny", 64, "score")]
        sys.exit(main({[*words.split(), "--output", str(output)]!r}))
    """
    environment = {**os.environ, "PYTHONPATH": str(clone), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, env=environment, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    (measured,) = [row for row in rows if row["status"] == "ok"]
    assert done.returncode == 1, done.stdout + done.stderr
    assert (measured["contender"], measured["verdict"]) == ("fastdaa-score", "slower")
    assert measured["ratio"] > 1.5
    assert measured["new_seconds"] > 0.02
    # The Triton engine needs CUDA: listed, not dropped.
    assert {row["status"] for row in rows} <= {"ok", "absent"}
