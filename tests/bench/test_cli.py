"""``fastdaa bench``: dispatch, shared flags, quick help, and the pytest-benchmark entry."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastdaa.cli import bench, main

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch", "transformers", "trl", "liger_kernel", "matplotlib", "rich", "scipy", "datasets",
)  # fmt: skip


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """The head's benchmark replaced by one that only notes its options."""
    noted: list[argparse.Namespace] = []
    module = ModuleType("fastdaa.benchmarks.head")
    module.add_arguments = lambda parser: parser.add_argument("--own", type=int)
    module.run = lambda options: noted.append(options) or 7
    monkeypatch.setitem(sys.modules, "fastdaa.benchmarks.head", module)
    return noted


def test_passes_options_on(ran: list[argparse.Namespace]) -> None:
    words = "bench head --cases a,b --device cpu --threads 3 --seed 5 --budget 1.5 --own 4"
    assert main(words.split()) == 7
    (options,) = ran
    assert (options.cases, options.threads, options.seed, options.budget) == (["a", "b"], 3, 5, 1.5)
    assert options.own == 4
    assert options.command == f"fastdaa {words}"


def test_defaults_are_filled_in(ran: list[argparse.Namespace]) -> None:
    main(["bench", "head"])
    (options,) = ran
    assert options.device in ("cpu", "cuda")
    assert options.threads >= 1
    assert options.output is None and options.compare is None and not options.fresh


def test_a_benchmark_may_define_a_shared_flag_anew(
    ran: list[argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["fastdaa.benchmarks.head"]
    monkeypatch.setattr(
        module, "add_arguments", lambda parser: parser.add_argument("--selection", default="mine")
    )
    main(["bench", "head"])
    assert ran[0].selection == "mine"


def test_compare_does_not_run_the_benchmark(
    ran: list[argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdaa.benchmarks.compare import turns

    seen = []
    monkeypatch.setattr(turns, "run", lambda kind, options: seen.append((kind, options)) or 1)
    assert main(["bench", "head", "--compare", "v1", "--threshold", "0.1"]) == 1
    assert not ran
    assert (seen[0][0], seen[0][1].compare, seen[0][1].threshold) == ("head", "v1", 0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("haed", "did you mean 'head'?"),
        ("everything", "one of head, loss, step, memory, accuracy, report"),
    ],
)
def test_unknown_command(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--repeats 0", "above 0"),
        ("--threads two", "whole number"),
        ("--budget -1", "seconds above 0"),
        ("--budget soon", "a number"),
        ("--threshold 5", "from 0 to below 1"),
        ("--cases ,", "names with commas"),
        ("--cases a --selection cpu", "not allowed with"),
        ("--unheard-of", "unknown option '--unheard-of'; `fastdaa bench head --help` lists"),
        ("--threshold 0.1", "--threshold: expected --compare beside it"),
        ("--launches 2", "--launches: expected --compare beside it"),
        ("--fresh", "--fresh: expected --output beside it"),
    ],
)
def test_wrong_flags(
    ran: list[argparse.Namespace],
    words: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "head", *words.split()]) == 2
    error = capsys.readouterr().err
    # One line, without the usage of all flags above it.
    assert error.startswith("fastdaa bench: error: ") and error.count("\n") == 1
    assert message in error
    assert not ran


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there(
    ran: list[argparse.Namespace], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "head", "--device", "cuda"]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err
    assert not ran


def test_overview_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    for word in (*bench.MEASURING, "report", "--selection", "--compare", "--output", "--fresh"):
        assert word in text, word
    assert main(["bench"]) == 2


def test_help_needs_nothing_heavy() -> None:
    """Not even torch: help comes at once."""
    code = f"""if True:
        import json, sys, time, fastdaa.cli
        for kind in ([], *([name] for name in {[*bench.MEASURING, "report"]!r})):
            start = time.process_time()
            try:
                fastdaa.cli.main(["bench", *kind, "--help"])
            except SystemExit as stop:
                assert not stop.code
            loaded = sorted(set(sys.modules) & set({HEAVY!r}))
            assert not loaded, (kind, loaded)
            assert time.process_time() - start < 0.3, kind
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pytest_run(*words: str, head: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """`pytest benchmarks/` on one tiny case, in a process of its own."""
    script = f"""if True:
        import sys, pytest
        from fastdaa.benchmarks import cases
        from fastdaa.benchmarks.contenders import fastdaa
        cases.SELECTIONS["head"]["quick"] = [cases.Case({head!r}, 32)]
        cases.SELECTIONS["loss"]["quick"] = []
        {code}
        sys.exit(pytest.main({["-p", "no:cacheprovider", "-q", *words, "benchmarks/"]!r}))
    """
    # A worker of pytest-xdist tells its children that they are workers, and those time nothing.
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )


@pytest.mark.slow
def test_pytest_benchmark_entry(tmp_path: Path) -> None:
    file = tmp_path / "now.json"
    only = ("-k", "pytorch or recompute or cce-exact", "--benchmark-max-time=0.01")
    # Its first call takes 64 MiB, as a compiler would.
    compiling = (
        "import torch; inner = fastdaa.Fastdaa.prepare; "
        "first = iter([torch.zeros]); "
        "fastdaa.Fastdaa.prepare = lambda self, inputs: (lambda run: lambda: "
        "([make(1 << 24) for make in first], run())[1])(inner(self, inputs))"
    )
    done = pytest_run(*only, f"--benchmark-json={file}", head="tiny", code=compiling)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        mark["extra_info"]["contender"]: mark for mark in json.loads(file.read_text())["benchmarks"]
    }
    assert {"pytorch", "fastdaa-recompute"} <= set(found)
    assert {mark["group"] for mark in found.values()} == {"head tiny-logps-n32-fp32-peaked-trained"}
    ours = found["fastdaa-recompute"]["extra_info"]
    assert ours["status"] == "ok" and ours["error"]["dh"] < ours["error"]["limit"]["dh"]
    assert 0 < ours["peak_bytes"] < 1 << 22, "not that of the first call"
    assert ours["case_params"]["N"] == 32 and ours["machine"]["torch"]
    assert "skipped" in done.stdout, "what is not here is said to be skipped"
    again = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(file)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0 and "fastdaa-recompute" in again.stdout


@pytest.mark.slow
def test_pytest_benchmark_fails_on_a_wrong_gradient() -> None:
    broken = (
        "inner = fastdaa.Fastdaa.prepare; "
        "fastdaa.Fastdaa.prepare = lambda self, inputs: (lambda run: lambda: "
        "(lambda out: out._replace(dw=out.dw * 1.5))(run()))(inner(self, inputs))"
    )
    done = pytest_run("-k", "fastdaa-recompute and not triton", head="tiny", code=broken)
    assert done.returncode == 1
    assert "WRONG: dw" in done.stdout
    assert "Rounds" not in done.stdout, "what is wrong has no time"


def test_plain_pytest_does_not_look_there(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert "bench_*.py" in pytestconfig.getini("python_files")
    assert not list((ROOT / "tests").rglob("bench_*.py"))
