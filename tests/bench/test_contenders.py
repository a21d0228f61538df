"""Every adapter against the oracle, and what rows say of the slow, the broken and the absent."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdaa.benchmarks import contenders, head, loss, side_by_side, sweep
from fastdaa.benchmarks.cases import LOSSES, SELECTIONS, TOKEN_WORKS, Case, select_cases
from fastdaa.benchmarks.contenders import ALL, Absent, Contender, Outputs, TokenScorer
from fastdaa.benchmarks.contenders.products import tile_rows
from fastdaa.benchmarks.contenders.pytorch import in_chunks
from fastdaa.benchmarks.inputs import HeadInputs, make_inputs, sequence_counts
from fastdaa.benchmarks.rows import read_rows
from fastdaa.benchmarks.side_by_side import Settings, compare

COMPILED = ("torch-compile", "cce-torch-compile")
NOT_COMPILED = [c for c in ALL if c.name not in COMPILED]
CASES = [
    *(Case("tiny", 64, work) for work in TOKEN_WORKS),
    *(Case("tiny", 64, loss, reference="online", lengths="spread") for loss in LOSSES),
    Case("tiny", 64, "dpo"),
    Case("tiny", 64, "slic", head_grad=False, reference="online"),
    Case("tiny", 64, head_grad=False),
    Case("tiny-softcap", 64, "apa"),
    Case("tiny-softcap", 64, head_grad=False),
    Case("tiny", 64, "dpo", "bfloat16", reference="online"),
    Case("tiny", 64, "ce", "float16", distribution="flat"),
]


def settings(kind: str = "head", device: str = "cpu", **changes: Any) -> Settings:
    return Settings(
        kind, device, seed=0, threads=1, machine={}, command="a test",
        **{"repeats": 3, "timed": False, **changes},
    )  # fmt: skip


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in rows}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_contender_agrees_with_the_oracle(case: Case) -> None:
    rows = by_name(compare(case, NOT_COMPILED, settings()))
    broken = {n: r["reason"] for n, r in rows.items() if r["status"] in ("wrong", "failed")}
    assert broken == {}
    done = {name for name, row in rows.items() if row["status"] == "ok"}
    assert "pytorch" in done
    assert any(name.startswith("fastdaa-") for name in done)
    assert all(row["deterministic"] for row in rows.values() if row["family"] == "fastdaa"
               and row["status"] == "ok")  # fmt: skip
    assert all(rows[name]["peak_bytes"] > 0 for name in done)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_contenders_agree_with_the_oracle(name: str) -> None:
    field = [c for c in ALL if c.name == name]
    case = Case("tiny-softcap", 64, "ce")
    row = by_name(compare(case, field, settings()))[name]
    if row["status"] == "absent":
        pytest.skip(row["reason"])
    assert row["status"] == "ok", row["reason"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *(Case("small", 512, work, "bfloat16") for work in TOKEN_WORKS),
        *(Case("small", 512, loss, "bfloat16", reference="online") for loss in LOSSES),
        Case("small-softcap", 512, "dpo", "bfloat16", head_grad=False),
    ],
    ids=lambda case: case.id,
)
def test_every_contender_agrees_on_cuda(case: Case) -> None:
    # Peers that compile take minutes, and this is not about them.
    field = [c for c in NOT_COMPILED if c.family in ("pytorch", "trl", "fastdaa")]
    rows = compare(case, field, settings(device="cuda", timed=True))
    ours = {r["contender"]: r["reason"] for r in rows if r["family"] == "fastdaa"}
    bad = {r["contender"] for r in rows if r["status"] in ("wrong", "failed")}
    assert not bad & set(ours), ours


class Broken(TokenScorer):
    """Log-probs of ``pytorch`` with something done to what comes out."""

    name, family = "broken", "pytorch"

    def __init__(self, change: Callable[[Outputs], Outputs]):
        self.change = change

    def version(self) -> str:
        return "1"

    def gemms(self, case: Case) -> int:
        return 3

    def prepare(self, inputs: HeadInputs) -> Callable[[], Outputs]:
        run = ALL[0].prepare(inputs)
        return lambda: self.change(run())


class Missing(Broken):
    name = "missing"

    def version(self) -> str:
        raise Absent("its package is not installed")


def _sleep(outputs: Outputs) -> Outputs:
    time.sleep(0.02)
    return outputs


def _double_dw(outputs: Outputs) -> Outputs:
    return outputs._replace(dw=2 * outputs.dw)


def _raise(outputs: Outputs) -> Outputs:
    raise RuntimeError("out of memory\nmore about it")


def test_a_slowed_contender_shows_in_its_row() -> None:
    rows = by_name(compare(CASES[0], [ALL[0], Broken(_sleep)], settings(timed=True)))
    slow = rows["broken"]
    assert slow["status"] == "ok"
    assert slow["seconds"]["median"] > 0.02 > 2 * rows["pytorch"]["seconds"]["median"]
    assert slow["speedup_over_reference"] < 0.5
    assert rows["pytorch"]["speedup_over_reference"] == 1.0


def test_a_wrong_gradient_has_no_time_and_no_speed_up() -> None:
    rows = by_name(compare(CASES[0], [ALL[0], Broken(_double_dw)], settings(timed=True)))
    row = rows["broken"]
    assert row["status"] == "wrong" and row["reason"].startswith("dw")
    assert row["error"]["dw"] == pytest.approx(1.0, rel=1e-3)
    assert row["seconds"] is None and row["speedup_over_reference"] is None


def test_results_that_come_and_go_are_not_deterministic() -> None:
    calls = iter(range(10))

    def drift(outputs: Outputs) -> Outputs:
        return outputs._replace(logps=outputs.logps + 1e-7 * next(calls))

    def fail_later(outputs: Outputs) -> Outputs:
        return _double_dw(outputs) if next(calls) else outputs

    row = by_name(compare(CASES[0], [Broken(drift)], settings()))["broken"]
    assert row["status"] == "ok" and row["deterministic"] is False
    calls = iter(range(10))
    row = by_name(compare(CASES[0], [Broken(fail_later)], settings()))["broken"]
    assert row["status"] == "wrong"


def test_one_failure_does_not_stop_the_others() -> None:
    rows = by_name(compare(CASES[0], [Broken(_raise), ALL[0]], settings(timed=True)))
    assert rows["broken"]["status"] == "failed"
    assert rows["broken"]["reason"] == "RuntimeError: out of memory ... more about it"
    assert rows["pytorch"]["status"] == "ok" and rows["pytorch"]["seconds"]["n"] == 3


def test_who_fails_while_timed_drops_out_and_the_others_are_timed() -> None:
    calls = iter(range(10))

    def fail_later(outputs: Outputs) -> Outputs:
        return outputs if next(calls) < 3 else _raise(outputs)

    rows = by_name(compare(CASES[0], [ALL[0], Broken(fail_later)], settings(timed=True)))
    assert rows["broken"]["status"] == "failed" and rows["broken"]["seconds"] is None
    assert rows["broken"]["reason"].startswith("while it was timed: RuntimeError")
    assert rows["pytorch"]["status"] == "ok" and rows["pytorch"]["seconds"]["n"] == 3
    assert rows["floor-3u"]["seconds"]["n"] == 3


def test_nobody_counts_as_finished_after_the_device_was_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CUDA after an illegal address: every later call would fail, too."""
    monkeypatch.setattr(side_by_side, "device_is_lost", lambda device: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(side_by_side, "measure_peak", lambda run, device: (run(), 0))
    case, given = CASES[0], settings(timed=True, device="cuda")
    monkeypatch.setattr(side_by_side, "make_inputs", lambda case, seed, device: make_inputs(case))
    rows = by_name(compare(case, [ALL[0], Broken(_raise), ALL[3]], given))
    assert rows["broken"]["device_lost"] is True
    assert {row["status"] for row in rows.values()} <= {"failed", "absent"}
    assert rows["pytorch"]["reason"] == "not measured: broken lost the device"


def test_the_absent_are_listed() -> None:
    rows = by_name(compare(CASES[0], [*NOT_COMPILED, Missing(_sleep)], settings()))
    assert rows["missing"]["status"] == "absent"
    assert rows["missing"]["reason"] == "its package is not installed"
    if not torch.cuda.is_available():
        for name in ("cce", "cce-exact", "liger-flce", "fastdaa-recompute-triton"):
            assert rows[name]["status"] == "absent"
            # Only `make bench` installs the peers.
            assert "CUDA" in rows[name]["reason"] or "is not installed" in rows[name]["reason"]


def test_what_a_peer_lacks_is_said() -> None:
    rows = by_name(compare(Case("tiny-softcap", 64, "ipo"), NOT_COMPILED, settings()))
    if rows["torch-linear-ce"]["status"] != "absent":  # PyTorch 2.13 brings it
        assert "no softcap" in rows["torch-linear-ce"]["reason"]
        assert rows["torch-linear-ce"]["status"] == "skipped"
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    assert "no ipo" in rows["liger-dpo"]["reason"]
    assert rows["liger-dpo"]["status"] == "skipped"


@pytest.mark.parametrize(
    ("tokens", "most", "rows"),
    [
        (8192, 8372, 8192),
        (65536, 8372, 8192),
        (8192, 7067, 4096),
        (8192, 4194, 4096),
        (300, 299, 256),
        (64, 5, 5),
        (7, 1, 1),
        (16, 1000, 16),
    ],
    ids=["llama3", "llama3-65536", "qwen3", "gemma2", "uneven", "small", "row", "few"],
)
def test_tiles_of_the_floor_are_of_equal_height(tokens: int, most: int, rows: int) -> None:
    """8192 rows for Qwen in tiles of 7067 and 1125 would be a slow floor, and flatter everyone."""
    assert tile_rows(tokens, most) == rows


@pytest.mark.parametrize(
    ("case", "chunks", "gemms"),
    [
        (Case("tiny", 64), True, 4),
        (Case("tiny", 64, "ce"), True, 3),
        (Case("small", 256), False, 3),
        (Case("llama3-8b", 8192, "dpo", reference="online"), True, 5),
        (Case("llama3-8b", 2048, "dpo", reference="online"), False, 4),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else str(value),
)
def test_pytorchs_own_function_is_used_as_its_documentation_says(
    case: Case, chunks: bool, gemms: int
) -> None:
    """In chunks for at least D tokens: below, "the reference path is cheaper"."""
    (contender,) = (c for c in ALL if c.name == "torch-linear-ce")
    assert in_chunks(case) is chunks
    assert contender.gemms(case) == gemms


def test_a_case_begins_with_nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else peers' code of the second case is that for any size, and that of the ninth is none."""
    import torch._dynamo

    resets: list[bool] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(True))
    compare(CASES[0], [ALL[0]], settings())
    assert resets == [True]


def test_what_a_failure_held_is_free_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in a cycle with its own tensors, as autograd's are."""
    left: list[weakref.ref[torch.Tensor]] = []

    class Leaks(Broken):
        name = "leaks"

        def prepare(self, inputs: HeadInputs) -> Callable[[], Outputs]:
            def run() -> Outputs:
                held = torch.zeros(9)
                left.append(weakref.ref(held))
                cycle: list[Any] = [held]
                cycle.append(cycle)
                gc.collect()  # into the oldest generation
                raise RuntimeError("out of memory")

            return run

    class Next(Broken):
        name = "next"

        def prepare(self, inputs: HeadInputs) -> Callable[[], Outputs]:
            assert left and left[0]() is None
            return ALL[0].prepare(inputs)

    same = [Leaks(lambda outputs: outputs), Next(lambda outputs: outputs)]
    rows = by_name(compare(CASES[0], same, settings()))
    assert rows["leaks"]["status"] == "failed"
    assert rows["next"]["status"] == "ok", rows["next"]["reason"]


def test_floors_and_expected_times() -> None:
    from fastdaa.benchmarks.roof import Roof

    roof = Roof({"float32": 1e9}, 1e9)
    rows = by_name(compare(CASES[0], [ALL[0]], settings(timed=True, roof=roof)))
    unit = CASES[0].unit / 1e9
    for n in (1, 2, 3, 4):
        assert rows[f"floor-{n}u"]["expected_seconds"] == pytest.approx(n * unit)
    assert rows["floor-1u"]["seconds"]["median"] < rows["floor-4u"]["seconds"]["median"]
    logits = 64 * 1009
    assert rows["pytorch"]["expected_seconds"] == pytest.approx(3 * unit + 32 * logits / 1e9)
    assert rows["pytorch"]["floor"] == "3U"
    assert rows["pytorch"]["roof"] == {"flops": {"float32": 1e9}, "bandwidth": 1e9}
    assert rows["pytorch"]["floor_seconds"] == rows["floor-3u"]["seconds"]["median"]


def options(**changes: Any) -> argparse.Namespace:
    values = {
        "cases": ["small-logps-n512"], "selection": None, "contenders": ["pytorch"], "losses": None,
        "device": "cpu", "dtype": None, "threads": 1, "seed": 0, "repeats": 1, "budget": None,
        "output": None, "fresh": False, "list": False, "command": "fastdaa bench head",
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


@pytest.fixture
def tiny_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("head", "loss"):
        work = "logps" if kind == "head" else "dpo"
        cases = [Case("tiny", 64, work), Case("tiny", 64, work, head_grad=False)]
        monkeypatch.setitem(SELECTIONS[kind], "quick", cases)
    monkeypatch.setattr(sweep, "measure_roof", lambda device, dtypes: None)


@pytest.mark.parametrize(
    ("module", "ours"),
    [(head, "fastdaa-recompute"), (loss, "fastdaa-single-pass")],
    ids=["head", "loss"],
)
def test_a_run_writes_rows_and_goes_on(
    module: Any, ours: str, tiny_selection: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    asked = {"cases": None, "contenders": ["pytorch", "liger-dpo"], "output": path}
    assert module.run(options(**asked)) == 0
    first = read_rows(path)
    assert {"pytorch", "floor-3u"} <= {row["contender"] for row in first}
    asked["contenders"] = ["pytorch", ours]
    assert module.run(options(**asked)) == 0
    added = read_rows(path)[len(first) :]
    assert {row["contender"] for row in added if row["family"] != "floor"} == {ours}
    assert all(row["speedup_over_reference"] > 0 for row in added if row["contender"] == ours)
    assert "pytorch" in capsys.readouterr().out


def test_a_wrong_row_of_ours_is_an_error(
    tiny_selection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Broken(_double_dw)
    monkeypatch.setattr(contenders, "ALL", [ALL[0], wrong])
    assert head.run(options(cases=None, contenders=None)) == 0  # a peer's affair
    wrong.family = "fastdaa"
    assert head.run(options(cases=None, contenders=None)) == 1


def test_an_interrupted_run_keeps_what_is_finished(
    tiny_selection: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    calls = iter(range(100))

    def interrupt(outputs: Outputs) -> Outputs:
        if next(calls) == 3:  # three runs of the first case, then the second case
            raise KeyboardInterrupt
        return outputs

    monkeypatch.setattr(contenders, "ALL", [Broken(interrupt)])
    path = tmp_path / "rows.jsonl"
    asked = options(cases=None, contenders=None, output=path)
    assert head.run(asked) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert {row["case"] for row in read_rows(path)} == {"tiny-logps-n64-fp32-peaked-trained"}
    assert head.run(asked) == 0
    assert len({row["case"] for row in read_rows(path)}) == 2


def test_jobs_of_a_comparison(tiny_selection: None) -> None:
    jobs = loss.comparison_jobs(options(cases=None, contenders=None))
    assert {job["contender"] for job in jobs} >= {"fastdaa-single-pass", "fastdaa-frozen"}
    job = next(job for job in jobs if job["contender"] == "fastdaa-frozen")
    reply = loss.open_job(job)()
    assert reply["status"] == "ok" and reply["seconds"] > 0 and reply["peak_bytes"] > 0
    with pytest.raises(Absent, match="no contender 'fastdaa-warp'"):
        loss.open_job({**job, "contender": "fastdaa-warp"})


@pytest.mark.parametrize("kind", SELECTIONS)
def test_selections(kind: str) -> None:
    for selection, cases in SELECTIONS[kind].items():
        assert cases, selection
        ids = [case.id for case in cases]
        assert len(set(ids)) == len(ids), "two cases of the same name"
        assert all(case.dtype != "float32" for case in cases if selection == "gpu")
    with pytest.raises(ValueError, match="expected one of quick, cpu, gpu, full, got 'huge'"):
        select_cases(kind, "huge")
    with pytest.raises(ValueError, match="got 'nonsense'"):
        select_cases(kind, "quick", names=["nonsense"])


@pytest.mark.parametrize("names", [["nobody"], ["pytorch", "trll"]], ids=["one", "of two"])
def test_unknown_contenders_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="contenders: expected some of pytorch"):
        sweep.select_contenders(names, "head")


def test_families_select() -> None:
    chosen = sweep.select_contenders(["liger", "fastdaa"], "head")
    assert [c.name for c in chosen][:2] == ["liger-dpo", "liger-flce"]
    assert {c.family for c in chosen} == {"liger", "fastdaa"}
    head, memory, accuracy = (
        {c.name for c in sweep.select_contenders(None, kind)}
        for kind in ("head", "memory", "accuracy")
    )
    assert accuracy - head == {"pytorch-fp32-logits"}
    assert "fastdaa-recompute-64mib" in memory - head


@pytest.mark.parametrize("name", ["pytorch", "trl", "cce"])
def test_a_name_wins_over_the_family_of_that_name(name: str) -> None:
    assert sum(c.family == name for c in ALL) > 1
    assert [c.name for c in sweep.select_contenders([name], "head")] == [name]


@pytest.mark.parametrize("lengths", ["equal", "spread"])
def test_lengths_of_completions(lengths: str) -> None:
    case = Case("tiny", 4096, "dpo", lengths=lengths)
    counts = sequence_counts(case, seed=0)
    assert len(counts) == 2 * case.pairs == 16 and sum(counts) == 4096
    assert (len(set(counts)) == 1) == (lengths == "equal")
    assert max(counts) <= 8.5 * min(counts)


def test_inputs_are_a_matter_of_the_seed() -> None:
    first, again, other = (make_inputs(CASES[3], seed) for seed in (0, 0, 1))
    assert torch.equal(first.hidden, again.hidden) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.weight, other.weight)
    assert first.ref_hidden is not None and not torch.equal(first.hidden, first.ref_hidden)


def test_all_names_are_different() -> None:
    assert len({c.name for c in ALL}) == len(ALL)
    assert all(isinstance(c, Contender) for c in ALL)
