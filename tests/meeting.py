"""What tests of several processes share: how they meet, ZeRO settings, and whether runs agree."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastdaa.train.callbacks import read_metrics

# Numbers of time and memory, which no two runs share.
RATES = ("throughput/", "memory/", "packing/", "time")


def meeting(count: int) -> dict[str, str]:
    """The environment of processes that meet, but for their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def zero_settings(stage: int, **zero: Any) -> dict[str, Any]:
    """DeepSpeed with a ZeRO stage; small buckets, so that several are filled, and nothing kept."""
    zero = {"stage": stage, "reduce_bucket_size": 500, "overlap_comm": False, **zero}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 600}
        zero |= {"stage3_max_live_parameters": 2000, "stage3_max_reuse_distance": 0}
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
        "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The logged rows of a run's training."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def assert_agree(two: Path, one: Path, atol: float = 1e-5, may_lack: tuple[str, ...] = ()) -> None:
    """Final weights and logged rows of two runs; ``may_lack`` names what the first need not log."""
    got, expected = (load_file(folder / "final.safetensors") for folder in (two, one))
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=atol, rtol=1e-4)
    assert len(rows_of(two)) == len(rows_of(one)) > 0
    for row, wanted in zip(rows_of(two), rows_of(one), strict=True):
        for name, value in wanted.items():
            if not name.startswith(RATES) and (name in row or name not in may_lack):
                assert row[name] == pytest.approx(value, abs=1e-4), (row["step"], name)
