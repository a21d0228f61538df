"""Two processes with FSDP2: the drop-in trainers and TRL's own on the same."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from meeting import meeting
from safetensors.torch import load_file

SAMPLED = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
RUNS = {
    "dpo": ["DPO", {}, None],
    "dpo-bf16": ["DPO", {"bf16": True}, None],
    "dpo-lora": ["DPO", {}, {"r": 2, "init_lora_weights": False}],
    "kto": ["KTO", {}, None],
    "sft": ["SFT", {}, None],
    "grpo": ["GRPO", SAMPLED, None],
}


@pytest.fixture(scope="module")
def trained(trl, new_model, tokenizer, data, tmp_path_factory):
    """The folder in which all runs have left what they trained."""
    folder = tmp_path_factory.mktemp("fsdp")
    new_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "runs.json").write_text(json.dumps([*RUNS.values()]))
    for name in {run[0] for run in RUNS.values()}:
        data[name].to_json(folder / f"{name}.jsonl")
    root, script = Path(__file__).resolve().parents[2], Path(__file__).with_name("fsdp_runs.py")
    common = {
        **os.environ, **meeting(2), "PYTHONPATH": str(root), "TRL_EXPERIMENTAL_SILENCE": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)], stderr=subprocess.PIPE, text=True,
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    ends = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends[0][-3000:]
    return folder


def losses_of(folder, side, name):
    sharded, losses = json.loads((folder / f"{side}-{[*RUNS].index(name)}.json").read_text())
    assert sharded and len(losses) == 3
    return losses


def test_mixed_precision_of_fsdp2_rounds_no_log_probs(trained):
    """It casts what a model's forward returns; policy and reference are the same at first."""
    assert losses_of(trained, "ours", "dpo-bf16")[0] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "dpo-bf16"])
def test_fsdp2_trains_what_trl_trains(trained, name):
    number = [*RUNS].index(name)
    got, expected = (losses_of(trained, side, name) for side in ("ours", "theirs"))
    assert got == pytest.approx(expected, abs=2e-5)
    ours, theirs = (
        load_file(trained / f"{side}-{number}.safetensors") for side in ("ours", "theirs")
    )
    before = load_file(trained / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], atol=1e-5, rtol=1e-4)
    moved = [key for key in ours if key not in before or not torch.equal(ours[key], before[key])]
    assert moved
