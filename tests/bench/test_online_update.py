"""The benchmark of the on-policy step: equal steps, the gate, and the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastdaa.benchmarks import online_update
from fastdaa.benchmarks.online_contenders import contenders, disagreement
from fastdaa.benchmarks.step.cases import MODELS, WORKLOADS, Case
from fastdaa.online.config import OnlineConfig

CASE = Case(WORKLOADS["smoke"], MODELS["llama-smoke"], batch=4)


@pytest.mark.parametrize("algorithm", ["apa", "ppo", "awr"])
def test_all_take_the_same_steps(algorithm: str) -> None:
    config = OnlineConfig(output_dir=None, algorithm=algorithm, learning_rate=1e-3)  # type: ignore[arg-type]
    given = online_update.minibatches(CASE, 3, seed=0)
    steps = contenders(CASE, config, given.experience, given.batches, seed=0)
    assert list(steps) == ["packed", "padded", "padded-sliced"]
    for _ in range(3):  # the second and third from weights that have moved
        found = {name: step() for name, step in steps.items()}
        assert disagreement(found, 2e-3) == ""


def test_the_gate_names_what_differs() -> None:
    first = {"packed": {"loss/policy": 1.0}, "padded": {"loss/policy": 1.1}}
    assert disagreement(first, 0.05) == "loss/policy is 1.1 by padded, 1 by packed"
    assert disagreement(first, 0.2) == ""
    assert disagreement({"packed": {"a": 1.0}, "padded": {"a": float("nan")}}, 0.2)


def test_padding_share_by_hand() -> None:
    given = online_update.Minibatches(
        None,  # type: ignore[arg-type]
        [torch.tensor([0, 1]), torch.tensor([2])],
        [(4, 1), (1, 3), (2, 2)],
    )
    # Rectangles of 2 x (4 + 3) and 1 x 4 hold 9 and 4 tokens.
    assert online_update.padding_share(given) == pytest.approx(1 - 13 / 18)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["--workload", "smoke", "--model", "llama-smoke", "--minibatch", "4"]
    output = tmp_path / "rows.jsonl"
    try:
        code = online_update.main([*arguments, "--rounds", "3", "--output", str(output)])
        missed = online_update.main([*arguments, "--rounds", "1", "--least", "1000"])
    finally:
        torch.set_num_threads(threads)
    assert (code, missed) == (0, 1)
    out = capsys.readouterr().out
    assert "losses agree within 0.002" in out
    assert "expected packed to be at least 1000 times as fast" in out
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert row["case"] == "smoke/llama-smoke/apa"
    assert {len(times) for times in row["seconds"].values()} == {3}
    assert row["speedup"].keys() == {"padded", "padded-sliced"}


def test_nothing_is_timed_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(online_update, "_TOLERANCE", -1.0)
    assert online_update.main(["--workload", "smoke", "--model", "llama-smoke"]) == 1
    assert "wrong, so nothing is timed: loss/policy" in capsys.readouterr().out.replace("\n", " ")
