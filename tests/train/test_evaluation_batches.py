"""Evaluations during training: every pair once, whatever the number of processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from fastdaa.train.callbacks import read_metrics
from fastdaa.train.evaluation_batches import BatchesInStep

# Numbers of time and memory, which no two runs share.
RATES = ("eval_throughput/", "eval_memory/", "eval_runtime", "eval_samples", "eval_steps")
FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def evaluation_of(folder):
    (row,) = (row for row in read_metrics(folder / "metrics.jsonl") if "eval_loss" in row)
    return {name: value for name, value in row.items() if name != "time"}


CASES = [
    pytest.param(7, 3, {}, id="7 pairs, 3 processes"),
    pytest.param(
        13, 2, {"tokens_per_pack": 25, "dataloader_drop_last": True}, id="13 pairs, 2 processes"
    ),
    pytest.param(13, 2, FSDP, id="FSDP2"),
    pytest.param(2, 2, {**FSDP, "tokens_per_pack": 25}, id="FSDP2, a process without pairs"),
]


@pytest.mark.parametrize(("count", "processes", "options"), CASES)
def test_every_pair_once(run, run_several, tmp_path, pairs, count, processes, options):
    common = {
        "pairs": pairs(12).to_list(), "eval": pairs(count, seed=1).to_list(), "max_steps": 1,
        "per_device_eval_batch_size": 2, "eval_strategy": "steps", "save_strategy": "no",
        "optim": "sgd", "learning_rate": 0.3, **options,
    }  # fmt: skip
    alone = {name: value for name, value in common.items() if name not in FSDP}
    assert run(tmp_path / "one", per_device_train_batch_size=12, **alone) == 0
    common["per_device_train_batch_size"] = 12 // processes
    assert run_several(processes, tmp_path / "all", **common) == [0] * processes
    found, expected = evaluation_of(tmp_path / "all"), evaluation_of(tmp_path / "one")
    assert found.keys() == expected.keys() and expected["eval_rewards/margins"] != 0
    for name, value in expected.items():
        if not name.startswith(RATES):
            assert found[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name


def test_as_many_batches_on_every_process():
    loader = DataLoader([5, 6, 7], batch_size=2, collate_fn=lambda rows: {"rows": rows})

    def batches(most):
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), gather=lambda mine: torch.stack([mine, torch.tensor(most)])
        )
        return list(BatchesInStep(loader, accelerator))

    own = [{"rows": [5, 6]}, {"rows": [7]}]
    assert batches(1) == batches(2) == own
    assert batches(4) == [*own, *[{"rows": [7], "counted": 0}] * 2]
