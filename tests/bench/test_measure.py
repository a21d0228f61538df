"""Times in turns, summaries and peak memory, with candidates whose answers are known."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from fastdaa.benchmarks import roof
from fastdaa.benchmarks.measure import MIN_ROUNDS, interleave, measure_peak, summary

MIB = 1 << 20


def test_summary_by_hand() -> None:
    assert summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "median": 3.0, "p10": pytest.approx(1.4), "p90": pytest.approx(4.6), "min": 1.0, "n": 5,
    }  # fmt: skip
    assert summary([2.0])["p90"] == 2.0


def test_a_slowed_candidate_shows() -> None:
    runs = {"fast": lambda: None, "slow": lambda: time.sleep(0.004)}
    times = interleave(runs, "cpu", repeats=5)
    assert summary(times["slow"])["min"] >= 0.004
    assert summary(times["fast"])["median"] < summary(times["slow"])["median"] / 4


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    interleave(runs, "cpu", repeats=8, warmup=1, seed=3)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 9
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds[1:]}) > 1  # nobody is always first


def test_the_budget_ends_it_after_a_few_rounds() -> None:
    times = interleave({"a": lambda: time.sleep(0.002)}, "cpu", repeats=1000, budget=0.001)
    assert len(times["a"]) == MIN_ROUNDS
    times = interleave({"a": lambda: time.sleep(0.002)}, "cpu", repeats=1000, budget=0.3)
    assert MIN_ROUNDS < len(times["a"]) < 160


def test_repeats_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        interleave({"a": lambda: None}, "cpu", repeats=0)


def test_peak_counts_what_is_alive_together() -> None:
    before = torch.zeros(MIB)

    def run() -> torch.Tensor:
        first = before + 1  # 4 MiB
        second = first * 2  # 8 MiB are alive
        del first
        return second[:10].clone()

    result, peak = measure_peak(run, "cpu")
    assert result.shape == (10,)
    assert 8 * MIB <= peak <= 8 * MIB + 4096
    assert measure_peak(run, "cpu")[1] == peak


def test_peak_sees_temporaries_inside_operators_and_backward() -> None:
    x = torch.zeros(1024, 1024, requires_grad=True)

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(torch.log_softmax(x, dim=1)[:, 0].sum(), x)

    _, peak = measure_peak(run, "cpu")
    assert 3 * 4 * MIB <= peak <= 4 * 4 * MIB


def test_the_profiler_is_silent() -> None:
    """In a process of its own: the first profiler of a process decides for all that follow."""
    code = (
        "import torch; from fastdaa.benchmarks.measure import measure_peak;"
        "measure_peak(lambda: torch.zeros(4) + 1, 'cpu')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.gpu
def test_peak_and_times_on_cuda() -> None:
    def run() -> torch.Tensor:
        a = torch.zeros(MIB, device="cuda")
        return (a + 1).sum()

    assert measure_peak(run, "cuda")[1] >= 8 * MIB
    assert all(t > 0 for t in interleave({"a": run}, "cuda", repeats=3)["a"])


def test_the_roof_is_that_of_a_head_s_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states times the transposed weight: in fp16, a CPU is slow at the other layout."""
    seen, product = [], torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        seen.append((a.stride(), b.stride()))
        return product(a, b, **options)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(roof, "_PRODUCT", {"cpu": 16})
    monkeypatch.setattr(roof, "_COPIED", {"cpu": 1 << 10})
    assert roof.measure_roof("cpu", ("float16",)).flops["float16"] > 0
    assert set(seen) == {((16, 1), (1, 16))}
