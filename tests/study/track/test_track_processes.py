"""Several processes share the prompts and find what one alone finds."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("tracked_run.py")


def run(folder, out, ranks, **options):
    """Rows of a run of two steps with four pairs a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {
        "output_dir": str(out), "max_steps": 2, "per_device_train_batch_size": 4 // ranks,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no",
        "train_sampling_strategy": "sequential", "use_cpu": True, "beta": 0.1,
        **options.pop("settings", {}),
    }  # fmt: skip
    given = json.dumps({"settings": settings, "folder": str(folder), "lora": False, **options})
    processes = []
    for rank in range(ranks):
        env = dict(os.environ)
        if ranks > 1:
            env |= {
                "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), given], env=env, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [json.loads(line) for line in (out / "track.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny, tokenizer, text_pairs):
    path = tmp_path_factory.mktemp("files")
    tiny().save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    text_pairs().to_json(path / "pairs.jsonl")
    text_pairs(seed=9).to_json(path / "held_out.jsonl")
    return path


@pytest.fixture(scope="module")
def alone(folder):
    """``alone(lora)``: the rows of one process."""
    return functools.cache(lambda lora: run(folder, folder / f"one-{lora}", 1, lora=lora))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "lora"),
    [
        pytest.param({}, False, id="ddp"),
        pytest.param({"fsdp": True, "fsdp_config": {}}, False, id="fsdp2"),
        pytest.param({"fsdp": True, "fsdp_config": {}}, True, id="fsdp2, lora"),
    ],
)
def test_two_processes_find_what_one_finds(folder, alone, tmp_path, settings, lora):
    alone = alone(lora)
    shared = run(
        folder, tmp_path / "two", 2, lora=lora, settings={"ddp_backend": "gloo", **settings}
    )
    assert [row["checkpoint"] for row in shared] == [0, 1, 2]
    for one, two in zip(alone, shared, strict=True):
        assert two["samples"] == 9
        for name in ("score", "length", "finished"):
            assert one[name] == two[name], name
        for name in ("kl", "kl_k1", "entropy"):
            assert one[name] == pytest.approx(two[name], abs=2e-3), name
    assert shared[-1]["kl"] > 0.01
