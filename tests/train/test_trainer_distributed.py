"""Two processes over gloo: the same training as one process with twice the batch."""

from __future__ import annotations

import math
import signal

import pytest
import torch
from meeting import assert_agree, rows_of
from safetensors.torch import load_file

from fastdaa.data import PairCollator, PairRows
from fastdaa.train.checkpoints import last_complete


def packs_of(rows, tokens_per_pack):
    return len(PairCollator("prefix_shared", None, tokens_per_pack)(rows)["packs"])


CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "adapter": {"lora": {"r": 2}},
    "checkpointing": {"gradient_checkpointing": True},
}


COMPILED = pytest.param({"torch_compile_backend": "eager"}, id="compiled", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "options", [*(pytest.param(options, id=name) for name, options in CASES.items()), COMPILED]
)
def test_ddp_is_one_process_with_twice_the_batch(run, run_two, tmp_path, pairs, options):
    data = {"pairs": pairs(24).to_list(), "save_strategy": "no", **options}
    alone = {name: value for name, value in data.items() if name != "torch_compile_backend"}
    assert run(tmp_path / "one", per_device_train_batch_size=8, **alone) == 0
    assert run_two(tmp_path / "two", **data) == [0, 0]
    assert_agree(tmp_path / "two", tmp_path / "one")


def test_ranks_may_have_different_numbers_of_packs(run, run_two, tmp_path, pairs):
    data = pairs(24)
    options = {
        "pairs": data.to_list(), "save_strategy": "no", "train_sampling_strategy": "sequential",
    }  # fmt: skip
    rows = PairRows(data)
    counts = [packs_of(rows.__getitems__(range(i, i + 4)), 25) for i in range(0, 24, 4)]
    assert any(counts[i] != counts[i + 1] for i in range(0, 6, 2)) and max(counts) > 1
    assert run(tmp_path / "one", per_device_train_batch_size=8, **options) == 0
    assert run_two(tmp_path / "two", tokens_per_pack=25, **options) == [0, 0]
    assert_agree(tmp_path / "two", tmp_path / "one")


def fsdp(**config):
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **config}
    return {"fsdp": True, "fsdp_config": config}


PRECOMPUTED = {
    "ddp": {},
    "fsdp2": fsdp(),
    "fsdp2, unequal packs": {**fsdp(), "tokens_per_pack": 25},
    "fsdp2, adapter": {**fsdp(), "lora": {"r": 2}},
    "fsdp2, tied": {**fsdp(), "model": {"tie_word_embeddings": True}},
    "fsdp2, another reference": {**fsdp(), "reference": {}},
}


@pytest.mark.parametrize("sharding", PRECOMPUTED.values(), ids=PRECOMPUTED)
def test_the_ranks_share_precomputing(run, run_two, tmp_path, pairs, sharding):
    data = {"pairs": pairs(24).to_list(), "eval": pairs(7, seed=1).to_list()}
    # Of the batches of an evaluation, one rank has two and the other has one.
    options = {
        "save_strategy": "no", "precompute_ref_log_probs": True, "precompute_ref_batch_size": 3,
        "optim": "sgd", "learning_rate": 0.3, "eval_strategy": "epoch", **data, **sharding,
    }  # fmt: skip
    cache = {"ref_cache_dir": str(tmp_path / "cache"), "lone": "reference" not in options}
    assert run_two(tmp_path / "two", **cache, **options) == [0, 0]
    parts = [load_file(p) for p in (tmp_path / "cache").rglob("*.safetensors")]
    keys = [bytes(key.tolist()) for part in parts for key in part["keys"]]
    assert len(keys) == len(set(keys)) == 31
    sizes = sorted(len(part["keys"]) for part in parts)
    assert sizes == [3, 4, 12, 12]
    alone = {name: options[name] for name in options if name not in fsdp()}
    alone |= {"precompute_ref_log_probs": False, "log_exact_kl": False}
    assert run(tmp_path / "one", per_device_train_batch_size=8, **alone) == 0
    assert_agree(tmp_path / "two", tmp_path / "one")
    # Another run finds them, one process more than it needs.
    alone |= {"precompute_ref_log_probs": True, **cache}
    assert run(tmp_path / "again", per_device_train_batch_size=8, **alone) == 0
    assert len([*(tmp_path / "cache").rglob("*.safetensors")]) == len(parts)


@pytest.mark.parametrize("sharding", [{}, fsdp()], ids=["ddp", "fsdp2"])
def test_a_signal_to_one_process_stops_both(run_two, tmp_path, sharding):
    options = {"save_steps": 100, "model": {"attention_dropout": 0.2}, "disable_dropout": False}
    options |= sharding
    assert run_two(tmp_path / "whole", **options) == [0, 0]
    end = {"step": 3, "number": signal.SIGINT, "rank": 1}
    assert run_two(tmp_path / "out", end=end, **options) == [130, 130]
    assert last_complete(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-3")
    assert run_two(tmp_path / "out", resume=True, **options) == [0, 0]
    got, expected = (load_file(tmp_path / f / "final.safetensors") for f in ("out", "whole"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    steps = [row["step"] for row in rows_of(tmp_path / "out")]
    assert steps == sorted(set(steps)) and len(steps) == 6


def test_a_launcher_ends_no_process_that_still_writes(run_two, tmp_path):
    end = {"step": 3, "number": signal.SIGTERM, "rank": 1}
    options = {"save_steps": 100, "launcher": True, "slow_end": True}
    codes = run_two(tmp_path, end=end, **options)
    assert 130 in codes and set(codes) <= {130, -signal.SIGTERM}
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-3")
    assert (tmp_path / "ended").exists()


SHARDED = {
    "plain": {},
    "head cut up after the forward": {"reshard": True},
    "tied": {"model": {"tie_word_embeddings": True}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "adapter": {"lora": {"r": 2}},
    "adapter on the head": {"lora": {"r": 2, "target_modules": ["q_proj", "lm_head"]}},
    "whole head": {"lora": {"r": 2, "modules_to_save": ["lm_head"]}},
    "unequal packs": {"tokens_per_pack": 25, "train_sampling_strategy": "sequential"},
}


@pytest.mark.parametrize("options", SHARDED.values(), ids=SHARDED)
def test_fsdp2_is_one_process_with_twice_the_batch(run, run_two, tmp_path, pairs, options):
    # Steps of SGD do not blow up rounding errors as those of Adam do.
    common = {
        "pairs": pairs(24).to_list(), "save_strategy": "no", "optim": "sgd", "learning_rate": 0.3,
        "eval": pairs(15, seed=1).to_list(), "eval_strategy": "epoch", **options,
    }  # fmt: skip
    alone = {name: value for name, value in common.items() if name != "reshard"}
    assert run(tmp_path / "one", per_device_train_batch_size=8, **alone) == 0
    assert run_two(tmp_path / "two", **fsdp(), **common) == [0, 0]
    assert_agree(tmp_path / "two", tmp_path / "one")


def test_fsdp2_rounds_no_log_probs(run_two, tmp_path, pairs):
    """Its mixed precision casts what a model's forward returns."""
    options = {"pairs": pairs(24).to_list(), "save_strategy": "no", "bf16": True, "max_steps": 1}
    assert run_two(tmp_path, **fsdp(), **options) == [0, 0]
    (row,) = (row for row in rows_of(tmp_path) if "loss" in row)
    assert row["rewards/margins"] == 0, row
    assert row["loss"] == pytest.approx(math.log(2), rel=1e-7)
    logps = row["logps/chosen"]
    assert logps != float(torch.tensor(logps).bfloat16()), row
