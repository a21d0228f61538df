"""DeepSpeed over two gloo processes: the same training as one process without it.

Skipped without the package ``deepspeed``, which is no requirement. On a CPU,
``DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed`` does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import meeting
import pytest
import torch
import transformers
from meeting import rows_of, zero_settings
from pieces import ON_CPU, run_alone
from safetensors.torch import load_file
from word_files import word_tokenizer, write_pairs

from fastdaa.train.checkpoints import last_complete

pytest.importorskip("deepspeed")


def deepspeed(stage, **zero):
    """Settings of a ZeRO stage."""
    return {"deepspeed": zero_settings(stage, **zero), "env": ON_CPU}


def assert_agree(two, one, atol=1e-5):
    """As everywhere, but for the norm of gradients, which DeepSpeed does not give at stage 0."""
    meeting.assert_agree(two, one, atol, may_lack=("grad_norm",))


CASES = {
    "plain": {},
    "tied": {"model": {"tie_word_embeddings": True}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "adapter": {"lora": {"r": 2}},
    "adapter on the head": {"lora": {"r": 2, "target_modules": ["q_proj", "lm_head"]}},
    "whole head": {"lora": {"r": 2, "modules_to_save": ["lm_head"]}},
    "unequal packs": {
        "tokens_per_pack": 25, "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": 2,
    },
    "packed": {"layout": "packed"},
    "padded": {"layout": "padded"},
    "checkpointing": {"gradient_checkpointing": True},
    "recomputed logits": {"impl": "recompute"},
}  # fmt: skip
REPLICATED = ("plain", "adapter", "unequal packs")
EVERY_CASE = [
    pytest.param(stage, options, id=f"{name}, stage {stage}")
    for stage in (0, 1, 2, 3)
    for name, options in CASES.items()
    if stage > 1 or name in REPLICATED
]


@pytest.mark.parametrize(("stage", "options"), EVERY_CASE)
def test_zero_is_one_process_with_twice_the_batch(run, run_two, tmp_path, pairs, stage, options):
    # Steps of SGD do not blow up rounding errors as those of Adam do.
    common = {
        "pairs": pairs(24).to_list(), "save_strategy": "no", "optim": "sgd", "learning_rate": 0.3,
        "eval": pairs(15, seed=1).to_list(), "eval_strategy": "epoch", **options,
    }  # fmt: skip
    assert run(tmp_path / "one", per_device_train_batch_size=8, **common) == 0
    assert run_two(tmp_path / "two", **deepspeed(stage), **common) == [0, 0]
    assert_agree(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("stage", [2, 3])
def test_unpaired_data(run, run_two, tmp_path, unpaired, stage):
    common = {
        "pairs": unpaired(24).to_list(), "save_strategy": "no", "optim": "sgd",
        "learning_rate": 0.3, "loss_type": "kto",
    }  # fmt: skip
    assert run(tmp_path / "one", per_device_train_batch_size=8, groups=4, **common) == 0
    assert run_two(tmp_path / "two", **deepspeed(stage), **common) == [0, 0]
    assert_agree(tmp_path / "two", tmp_path / "one")


CACHED = [
    pytest.param(0, {}, id="stage 0"),
    pytest.param(1, {}, id="stage 1"),
    pytest.param(2, {}, id="stage 2"),
    pytest.param(3, {}, id="stage 3"),
    pytest.param(3, {"tokens_per_pack": 25}, id="unequal packs"),
    pytest.param(3, {"lora": {"r": 2}}, id="adapter"),
    pytest.param(3, {"reference": {}}, id="another reference"),
]


@pytest.mark.parametrize(("stage", "options"), CACHED)
def test_a_precomputed_reference(run, run_two, tmp_path, pairs, stage, options):
    # Of the batches of an evaluation, one process has two and the other has one.
    common = {
        "pairs": pairs(24).to_list(), "save_strategy": "no", "optim": "sgd", "learning_rate": 0.3,
        "eval": pairs(7, seed=1).to_list(), "eval_strategy": "epoch", "log_exact_kl": False,
        **options,
    }  # fmt: skip
    cached = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
    cached |= {"ref_cache_dir": str(tmp_path / "cache"), "lone": "reference" not in options}
    assert run(tmp_path / "one", per_device_train_batch_size=8, **common) == 0
    assert run_two(tmp_path / "two", **deepspeed(stage), **common, **cached) == [0, 0]
    assert_agree(tmp_path / "two", tmp_path / "one")
    parts = [load_file(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert sorted(len(part["keys"]) for part in parts) == [3, 4, 12, 12]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_process_that_misses_no_row_places_the_reference_as_well(
    run, run_two, tmp_path, pairs, stage
):
    data = pairs(24).to_list()
    common = {
        "save_strategy": "no", "optim": "sgd", "learning_rate": 0.3, "log_exact_kl": False,
        "precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    assert run(tmp_path / "before", pairs=data[:23], **common) == 0
    assert run_two(tmp_path / "two", pairs=data, **deepspeed(stage), **common) == [0, 0]
    # The first process has nothing to compute for the last row.
    parts = [load_file(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert sorted(len(part["keys"]) for part in parts) == [1, 23]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [{}, {"lora": {"r": 2}}], ids=["full", "adapter"])
def test_a_stopped_run_goes_on_to_the_bit(run_two, tmp_path, stage, kind):
    options = {"save_steps": 100, "model": {"attention_dropout": 0.2}, "disable_dropout": False}
    options |= {**kind, **deepspeed(stage)}
    assert run_two(tmp_path / "whole", **options) == [0, 0]
    end = {"step": 3, "number": signal.SIGTERM if stage % 2 else signal.SIGINT, "rank": 1}
    assert run_two(tmp_path / "out", end=end, **options) == [130, 130]
    assert last_complete(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-3")
    assert run_two(tmp_path / "out", resume=True, **options) == [0, 0]
    got, expected = (load_file(tmp_path / f / "final.safetensors") for f in ("out", "whole"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    steps = [row["step"] for row in rows_of(tmp_path / "out")]
    assert steps == sorted(set(steps)) and len(steps) == 6


def test_a_checkpoint_goes_on_as_it_was_cut(run, run_two, tmp_path):
    assert run_two(tmp_path, max_steps=2, **deepspeed(2)) == [0, 0]
    assert run_two(tmp_path, max_steps=4, resume=True, **deepspeed(3)) == [1, 1]
    assert run(tmp_path, max_steps=4, resume=True) == 1
    assert run_two(tmp_path, max_steps=4, resume=True, **deepspeed(2)) == [0, 0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_is_close_to_fp32(run, run_two, tmp_path, pairs, stage):
    common = {
        "pairs": pairs(24).to_list(), "save_strategy": "no", "optim": "sgd", "learning_rate": 0.3,
    }  # fmt: skip
    assert run(tmp_path / "one", per_device_train_batch_size=8, **common) == 0
    assert run_two(tmp_path / "two", bf16=True, **deepspeed(stage), **common) == [0, 0]
    got, expected = (rows_of(tmp_path / folder) for folder in ("two", "one"))
    # Policy and reference are rounded alike: at the start there is nothing between them.
    assert got[0]["rewards/margins"] == 0.0 and got[0]["kl/token"] == pytest.approx(0, abs=1e-6)
    for row, wanted in zip(got, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], abs=0.05)
    weights = load_file(tmp_path / "two" / "final.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_weights_that_are_not_finite_are_not_saved(run_two, tmp_path):
    options = {"learning_rate": 1e39, "optim": "sgd", "logging_strategy": "no", "save_steps": 1}
    assert run_two(tmp_path, **options, **deepspeed(3)) == [1, 1]
    assert not list(tmp_path.glob("checkpoint-*"))


CUT = """
import deepspeed, torch
from fastdaa.train.backbone import install_head_task, run_head_task
from fastdaa.train.sharding import head_afterwards, head_in_force
from pieces import cut

core, whole, engine = model = cut(install_head_task)
head = core.lm_head.weight
sizes, note = model.watch()

def task(hidden):
    with head_in_force(core) as live:
        assert torch.equal(live.weight, whole)
        loss = live.logits(hidden).square().mean()
    loss.register_hook(note)
    return loss

for _ in range(2):
    ids = torch.arange(5)[None]
    loss = run_head_task(engine, {"input_ids": ids, "position_ids": ids}, task).result
    assert head.numel() == 0
    engine.backward(loss)
    assert torch.equal(head_afterwards(core).weight, whole) and head.numel() == 0
    assert sizes == [0, whole.numel(), 0], sizes
    sizes.clear()
    engine.step()
    with deepspeed.zero.GatheredParameters([head]):
        assert not torch.equal(head, whole)
        whole = head.detach().clone()
core, whole, engine = cut(install_head_task, tie_word_embeddings=True)
assert torch.equal(head_afterwards(core).weight, whole)
"""


def test_the_head_is_whole_around_its_own_work_alone():
    run_alone(CUT)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_command_saves_a_whole_model(tmp_path, tiny_model, stage):
    tiny_model().save_pretrained(tmp_path / "start")
    word_tokenizer().save_pretrained(tmp_path / "start")
    write_pairs(tmp_path / "pairs.jsonl", 8)
    (tmp_path / "ds.json").write_text(json.dumps(deepspeed(stage)["deepspeed"]))
    command = [
        *("fastdaa.cli", "train", "--model", tmp_path / "start", "--use_cpu", "--max_steps", 2),
        *("--dataset", tmp_path / "pairs.jsonl", "--optim", "sgd", "--learning_rate", 0.3),
        *("--report_to", "none", "--save_strategy", "no"),
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    two = ["--deepspeed", tmp_path / "ds.json", "--per_device_train_batch_size", 2]
    for name, arguments in (
        ("one", ["-m", *command, "--per_device_train_batch_size", 4]),
        ("two", [*launcher, *command, *two]),
    ):
        arguments = [sys.executable, *map(str, arguments), "--output_dir", str(tmp_path / name)]
        ended = subprocess.run(
            arguments, capture_output=True, text=True, timeout=180, env={**os.environ, **ON_CPU}
        )
        assert ended.returncode == 0, ended.stderr
    kind = transformers.LlamaForCausalLM
    got, expected = (kind.from_pretrained(tmp_path / name) for name in ("two", "one"))
    start = dict(tiny_model().named_parameters())
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(dict(got.named_parameters())[name], weight)
    assert not torch.equal(start["lm_head.weight"], expected.lm_head.weight)
