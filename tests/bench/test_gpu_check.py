"""``make gpu-check`` without a GPU: parts that hang or fail take nothing from the others."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdaa.benchmarks import gpu_check
from fastdaa.benchmarks.gpu import measure
from fastdaa.benchmarks.gpu.answers import Answers
from fastdaa.benchmarks.gpu.measure import LOST
from fastdaa.benchmarks.gpu.processes import (
    _GRACE_SECONDS,
    Log,
    Part,
    run_part,
    written_rows,
)
from fastdaa.benchmarks.gpu.questions import SIZES, case_of
from fastdaa.benchmarks.gpu.report import as_lines, sections
from fastdaa.benchmarks.roof import Roof

ROW = '{{"status": "{}"}}\\n'


@pytest.fixture
def known_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of a machine that nobody asks for here: measuring them takes seconds on a CPU."""
    roof = Roof({"bfloat16": 1e10, "float32": 1e10}, 1e10)
    monkeypatch.setattr(measure, "measure_roof", lambda device, dtypes: roof)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with Log(tmp_path / "gpu_check.log") as opened:
        yield opened


def _part(name: str, line: str, seconds: float = 20.0, rows: Path | None = None) -> Part:
    return Part(name, (sys.executable, "-c", line), seconds, rows)


def test_every_part_runs_and_the_last_words_of_failures_come_last(
    tmp_path: Path, log: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "head_cuda.jsonl"
    rows.write_text(ROW.format("ok").replace("\\n", "\n"), encoding="utf-8")
    write = f"open({str(rows)!r}, 'a').write('{ROW.format('wrong')}')"
    found = [
        _part("tests", "pass"),
        _part("paths", f"{write}; raise SystemExit('ptxas said no')", rows=rows),
        _part("scaling", "import time; time.sleep(60)", seconds=0.5),
        _part("step", "import os; os.kill(os.getpid(), 9)"),
        _part("accuracy", "pass"),
    ]
    outcomes = gpu_check.check(found, log)
    assert [outcome.problem for outcome in outcomes] == [
        None, "exit code 1", "stopped after 0 s", "SIGKILL", None,
    ]  # fmt: skip
    assert outcomes[1].statuses == {"wrong": 1}, "rows of this run only"
    capsys.readouterr()
    gpu_check.summarise(outcomes, 3.0, log)
    said = capsys.readouterr().out
    assert said.index("ptxas said no") < said.index("summary")
    assert "failed: paths, scaling, step" in said
    assert said in (tmp_path / "gpu_check.log").read_text(encoding="utf-8")


def test_a_part_that_hangs_is_told_first_and_its_children_end_with_it(
    tmp_path: Path, log: Log
) -> None:
    """Told as by Ctrl-C: it still writes what it has. Its child never listens."""
    mark, child = tmp_path / "told", tmp_path / "child"
    line = (
        "import subprocess, sys, time, signal\n"
        "quiet = 'import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); '\n"
        "quiet += 'time.sleep(60)'\n"
        "process = subprocess.Popen([sys.executable, '-c', quiet])\n"
        f"open({str(child)!r}, 'w').write(str(process.pid))\n"
        "try:\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    open({str(mark)!r}, 'w').close()\n"
    )
    outcome = run_part(_part("step", line), 4.0, log)
    assert outcome.problem == "stopped after 4 s"
    assert mark.exists()
    state = Path(f"/proc/{child.read_text()}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child is still there")


def test_who_loses_the_device_is_left_out_of_the_next_try(tmp_path: Path, log: Log) -> None:
    """The part ends with ``LOST`` while ``b`` is among its contenders."""
    rows = tmp_path / "rows.jsonl"
    line = (
        "import json, sys\n"
        "names = sys.argv[2].split(',')\n"
        f"rows = open({str(rows)!r}, 'a')\n"
        "bad = {'contender': 'b', 'status': 'failed', 'device_lost': True}\n"
        "row = bad if 'b' in names else {'contender': 'a', 'status': 'ok'}\n"
        "print(json.dumps(row), file=rows)\n"
        f"raise SystemExit({LOST} if 'b' in names else 0)\n"
    )
    part = Part("paths", (sys.executable, "-c", line), 20.0, rows, ("a", "b", "c"))
    first, second = gpu_check.check([part], log)
    assert (first.code, first.lost) == (LOST, {"b"})
    assert (second.problem, second.part.contenders) == (None, ("a", "c"))
    assert [row["status"] for row in written_rows(rows)] == ["failed", "ok"]


def test_who_fails_alone_is_left_out_of_everything(tmp_path: Path, log: Log) -> None:
    rows = tmp_path / "trials.jsonl"
    trial = {"path": "score", "contender": "b", "status": "hung", "seconds": 1, "said": ["x"]}
    write = f"print({json.dumps(trial)!r}, file=open({str(rows)!r}, 'a')); raise SystemExit(1)"
    tell = "import sys; print('asked:', sys.argv[2])"
    found = [
        _part("trials", write, rows=rows),
        Part("paths", (sys.executable, "-c", tell), 20.0, contenders=("a", "b")),
    ]
    assert gpu_check.check(found, log)[1].said == ["asked: a"]


def test_parts_that_do_not_fit_any_more_are_named(log: Log) -> None:
    found = [_part("tests", "import time; time.sleep(1)"), _part("paths", "pass")]
    outcomes = gpu_check.check(found, log, all_seconds=0.8)
    assert outcomes[1].problem == "not started: the time was used up"


def test_the_table_comes_first_and_everything_fits_eight_minutes(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    found = gpu_check.parts("cuda", "gpu", tmp_path, tests)
    assert [part.name for part in found] == [
        "trials", "paths", "scaling", "vocabularies", "tests", "accuracy", "step",
    ]  # fmt: skip
    assert gpu_check.ALL_SECONDS + 3 * _GRACE_SECONDS <= 480
    assert sum(part.seconds for part in found[:5]) < gpu_check.ALL_SECONDS
    files = [Path(word).name for word in found[4].command if word.endswith(".py")]
    assert files[0] == "test_gpu.py" and files[1].startswith("test_kernels"), files
    assert "tests" not in [part.name for part in gpu_check.parts("cuda", "gpu", tmp_path, None)]


def test_the_name_of_a_test_is_printed_before_it_runs(tmp_path: Path) -> None:
    """Where it hangs or takes the process with it, nothing comes after: dots do not say where."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_gpu.py").write_text(
        "import os, pytest, time\n\n@pytest.mark.gpu\ndef test_hangs():\n    os._exit(9)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n")
    (part,) = (p for p in gpu_check.parts("cuda", "gpu", tmp_path, tests) if p.name == "tests")
    with Log(tmp_path / "log") as log:
        said = run_part(part, 20.0, log).said
    assert any("::test_hangs" in line for line in said), said


def test_parts_compute_fp32_in_fp32(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    line = "import os; print('TF32', 'TORCH_ALLOW_TF32_CUBLAS_OVERRIDE' in os.environ)"
    assert run_part(_part("paths", line), 20.0, log).said == ["TF32 False"]


def test_tables_are_kept_after_every_part(tmp_path: Path, log: Log) -> None:
    kept: list[int] = []
    found = [_part("paths", "pass"), _part("scaling", "raise SystemExit(1)")]
    gpu_check.check(found, log, after=lambda: kept.append(len(kept)))
    assert kept == [0, 1]


def test_tables_of_another_machine_need_no_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--tables", "--results", str(tmp_path)]) == 1
    assert "expected rows of this check" in capsys.readouterr().err
    machine = {"device": "NVIDIA H200", "torch": "2.11.0", "commit": "abc"}
    case = case_of("score", SIZES["gpu"].case)
    row = {
        "kind": "head", "case": case.id, "case_params": case.params, "status": "ok",
        "contender": "fastdaa-score-triton", "family": "fastdaa", "floor_seconds": 0.011,
        "seconds": {"median": 0.0121, "n": 20}, "peak_bytes": 50 << 20, "machine": machine,
        "roof": {"flops": {"bfloat16": 7.42e14}, "bandwidth": 4.21e12},
    }  # fmt: skip
    rows = tmp_path / "gpu_check_cuda.jsonl"
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert gpu_check.main(["--tables", "--results", str(tmp_path)]) == 3
    said = capsys.readouterr().out
    assert "1.10 x 1U" in said and "missed: time" in said
    assert "bfloat16 742 TFLOP/s, copies 4.21 TB/s" in said
    assert (tmp_path / "gpu_check.md").exists()


def test_a_limit_that_is_missed_counts_where_its_part_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--only paths` is no failure of the numbers of tokens that it never measures."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "check", lambda found, log, left, after: [])
    monkeypatch.setattr(gpu_check, "Watch", lambda: contextlib.nullcontext())
    codes = []
    for unmet, only in (([], "paths"), (["scaling"], "paths"), (["scaling"], "scaling")):
        report = gpu_check.Report([], [], set(unmet))
        monkeypatch.setattr(gpu_check, "make_report", lambda *_, report=report: report)
        codes.append(gpu_check.main(["--results", str(tmp_path), "--only", only]))
    assert codes == [0, 0, 3]


def test_tables_that_fail_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: object) -> None:
        raise KeyError("flops")

    monkeypatch.setattr(gpu_check, "make_report", broken)
    monkeypatch.setattr(gpu_check, "_chosen", lambda parser, options: [_part("paths", "pass")])
    words = ["--device", "cpu", "--selection", "tiny", "--results", str(tmp_path)]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("the tables failed: KeyError: 'flops'") == 3 and "paths        ok" in said


def test_a_budget_ends_a_part_before_its_limit() -> None:
    part = Part("paths", ("run",), 100.0, contenders=("a", "b"), budget=True)
    assert part.words(50.0) == ["run", "--contenders", "a,b", "--budget", "40"]


def test_no_gpu_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main(["--device", "cuda", "--results", str(tmp_path)]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err


@pytest.mark.usefixtures("known_roof")
def test_a_part_writes_a_row_for_everybody_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a kernel, which runs in Triton's interpreter here."""
    pytest.importorskip("triton")
    path = tmp_path / "rows.jsonl"
    asked = ("fastdaa-score", "fastdaa-score-fused", "fastdaa-recompute")
    words = ["vocabularies", "--size", "tiny", "--device", "cpu", "--threads", "1"]
    words += ["--contenders", ",".join(asked), "--output", str(path)]
    assert measure.main(words) == 0
    rows = written_rows(path)
    ours = {(row["kind"], row["contender"]): row for row in rows if row["family"] == "fastdaa"}
    assert {name for _, name in ours} == set(asked)
    assert all(row["status"] == "ok" and row["seconds"]["n"] for row in ours.values())
    said = capsys.readouterr().out
    assert "tiny-softcap-score-n64-bf16-peaked: fastdaa-score-fused" in said
    assert measure.main(words) == 0
    assert len(written_rows(path)) == len(rows), "nothing is measured twice"
    table = as_lines(sections(Answers(rows, "tiny", "cpu")))
    assert "## Other vocabularies" in table


HANGING = """if True:
    import sys, threading
    from fastdaa.benchmarks.contenders.fastdaa import Fastdaa
    from fastdaa.benchmarks.gpu import measure
    from fastdaa.benchmarks.roof import Roof

    prepare = Fastdaa.prepare
    def hang(self, inputs):
        return threading.Event().wait if self.name == "fastdaa-recompute" else prepare(self, inputs)
    Fastdaa.prepare = hang
    measure.measure_roof = lambda device, dtypes: Roof({"bfloat16": 1e10, "float32": 1e10}, 1e10)
    alarm, watched = measure._Alarm, measure.asked.contender("fastdaa-recompute", "cpu")
    measure._Alarm = lambda contenders, ring: alarm([watched], ring)  # nobody on a CPU
    measure._HANGS_AFTER = 4.0
    raise SystemExit(measure.main(sys.argv[1:]))
"""


def test_who_hangs_is_left_out_of_the_next_try(tmp_path: Path, log: Log) -> None:
    """A kernel that hangs with many tokens was not found out when it ran alone with few."""
    rows = tmp_path / "rows.jsonl"
    words = ("paths", "--size", "tiny", "--device", "cpu", "--threads", "1", "--output", str(rows))
    names = ("fastdaa-score", "fastdaa-recompute")
    part = Part("paths", (sys.executable, "-c", HANGING, *words), 60.0, rows, names)
    first, second = gpu_check.check([part], log)
    assert (first.code, first.lost) == (LOST, {"fastdaa-recompute"})
    assert "fastdaa-recompute hangs: not done after 4 s" in first.said[-1]
    assert (second.problem, second.part.contenders) == (None, ("fastdaa-score",))
    asked = {(row["contender"], row["status"], row["reason"]) for row in written_rows(rows)}
    assert ("fastdaa-recompute", "failed", "hangs: not done after 4 s") in asked
    assert ("fastdaa-score", "ok", None) in asked


@pytest.mark.usefixtures("known_roof")
def test_a_used_up_budget_names_what_was_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["paths", "--size", "tiny", "--device", "cpu", "--contenders", "fastdaa-recompute"]
    words += ["--output", str(tmp_path / "rows.jsonl"), "--budget", "1e-9", "--threads", "1"]
    assert measure.main(words) == 1
    roof, said = capsys.readouterr().out.splitlines()
    assert roof == "roof: bfloat16 0.01 TFLOP/s, float32 0.01 TFLOP/s, copies 0.01 TB/s"
    assert said.startswith("not begun, the time was used up: tiny-dpo-n64-bf16-peaked-trained, ")


@pytest.mark.slow
def test_rehearsal_on_a_cpu(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--selection", "tiny", "--results", str(tmp_path)]
    assert gpu_check.main([*words, "--only", "accuracy"]) == 0
    rows = written_rows(tmp_path / "accuracy_cpu.jsonl")
    ours = {row["contender"]: row["status"] for row in rows if row["family"] == "fastdaa"}
    assert ours == {"fastdaa-recompute": "ok", "fastdaa-recompute-triton": "absent"}
    assert "## Accuracy" in (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
