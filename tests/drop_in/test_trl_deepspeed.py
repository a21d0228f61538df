"""The drop-in trainers with DeepSpeed on two gloo processes, beside TRL's own and one process.

Skipped without the package ``deepspeed``, which is no requirement. On a CPU,
``DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed`` does.
"""

from __future__ import annotations

import json
import multiprocessing
import runpy
from pathlib import Path

import pytest
import torch
from drop_in.trl_runs import compare_rows
from meeting import meeting, zero_settings
from pieces import run_alone
from safetensors.torch import load_file

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("ignore")

RUN = Path(__file__).with_name("trl_process.py")
SETTINGS = {
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 3,
    # Steps of SGD do not blow up rounding errors as those of Adam do.
    "optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "logging_steps": 1,
    "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "dataloader_pin_memory": False, "disable_tqdm": True,
}  # fmt: skip
IN_ORDER = {"train_sampling_strategy": "sequential"}
SAMPLED = {"num_generations": 2, "max_completion_length": 6, "beta": 0.2}
OWN = {
    "DPO": {"beta": 0.3, **IN_ORDER}, "KTO": {"beta": 0.3, **IN_ORDER}, "SFT": IN_ORDER,
    "GRPO": SAMPLED, "RLOO": SAMPLED,
}  # fmt: skip


@pytest.fixture(scope="module")
def start(trl):
    """``start(**OPTIONS)``: a started process of ``trl_process.py``, forked after the imports."""
    context = multiprocessing.get_context("forkserver")
    modules = [f"trl.trainer.{name.lower()}_trainer" for name in OWN]
    context.set_forkserver_preload([*modules, "peft", "fastdaa.drop_in.trl"])

    def started(**options):
        process = context.Process(
            target=runpy.run_path, args=(str(RUN),), kwargs={"init_globals": {"OPTIONS": options}}
        )
        process.start()
        return process

    return started


@pytest.fixture
def run(start, new_model, tokenizer, data, tmp_path):
    """``run(name, ours, stage, **options)``: the folder of a run's results.

    ``stage`` None is one process without DeepSpeed, with twice the batch.
    """

    def to_the_end(trainer, ours, stage, settings=None, model=None, **options):
        if not (tmp_path / "start").exists():
            data[trainer].save_to_disk(tmp_path / "data")
            tokenizer.save_pretrained(tmp_path / "start")
            for seed, name in enumerate(["start", "other"]):
                new_model(seed=seed, **(model or {})).save_pretrained(tmp_path / name)
        folder = tmp_path / f"{'ours' if ours else 'theirs'}-{stage}"
        own = {**SETTINGS, **OWN[trainer], **(settings or {})}
        ranks = [{}]
        if stage is None:
            own["per_device_train_batch_size"] *= 2
        else:
            own |= {
                "deepspeed": zero_settings(stage, stage3_gather_16bit_weights_on_model_save=True),
                "ddp_backend": "gloo",
            }
            common = {**meeting(2), "DS_ACCELERATOR": "cpu"}
            ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        if options.get("reference"):
            options["reference"] = str(tmp_path / "other")
        processes = [
            start(
                trainer=trainer, ours=ours, folder=str(folder), model=str(tmp_path / "start"),
                data=str(tmp_path / "data"), settings=own, env=env, **options,
            )
            for env in ranks
        ]  # fmt: skip
        for process in processes:
            process.join(150)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert codes == [0] * len(ranks), codes
        return folder

    return to_the_end


def assert_agree(got, expected):
    """Final weights, and all that was logged."""
    name = next(path.name for path in (expected / "final").glob("*.safetensors"))
    weights, wanted = (load_file(folder / "final" / name) for folder in (got, expected))
    assert weights.keys() == wanted.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], wanted[name], atol=1e-6, rtol=0)
    compare_rows(rows_of(got), rows_of(expected))
    assert any(row.get("grad_norm") for row in rows_of(got))


def rows_of(folder):
    rows = json.loads((folder / "log.json").read_text())
    # An estimate, which differs between one process and several.
    return [{key: row[key] for key in row.keys() - {"total_flos"}} for row in rows]


LORA = {"r": 2, "target_modules": ["q_proj"]}
CASES = {
    "tied": {"model": {"tie_word_embeddings": True}},
    "whole head": {"lora": {**LORA, "modules_to_save": ["lm_head"]}},
    "accumulation, evaluation": {
        "settings": {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
        "evaluated": True,
    },
    "checkpointing": {"settings": {"gradient_checkpointing": True}},
    "checkpointing, adapter": {"settings": {"gradient_checkpointing": True}, "lora": LORA},
    "reference of its own": {"reference": True},
    "precomputed": {"settings": {"precompute_ref_log_probs": True}},
    "precomputed, adapter": {"settings": {"precompute_ref_log_probs": True}, "lora": LORA},
    "synchronised": {"settings": {"sync_ref_model": True, "ref_model_sync_steps": 1}},
    "loaded early": {"in_memory": True},
    "recomputed logits": {"head_max_bytes": 20_000},
    "mixture of losses": {
        "settings": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
    },
}  # fmt: skip


ONLINE = {
    "entropy bonus": {"settings": {"entropy_coef": 0.05}},
    # Whole batches have no token to score then.
    "nothing scored": {"settings": {"mask_truncated_completions": True}},
    "experts": {"model": {"family": "Mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}},
}  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", OWN)
def test_zero_is_trl(run, name, stage):
    assert_agree(run(name, True, stage), run(name, False, stage))


@pytest.mark.parametrize("name", OWN)
def test_an_adapter_under_zero3_is_that_of_trl(run, name):
    assert_agree(run(name, True, 3, lora=LORA), run(name, False, 3, lora=LORA))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_zero3_on_pairs_is_trl(run, case):
    assert_agree(run("DPO", True, 3, **case), run("DPO", False, 3, **case))


@pytest.mark.parametrize("case", ONLINE.values(), ids=ONLINE)
def test_zero3_on_prompts_is_trl(run, case):
    assert_agree(run("GRPO", True, 3, **case), run("GRPO", False, 3, **case))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("name", "lora"), [("DPO", None), ("DPO", LORA), ("SFT", None)], ids=["DPO", "adapter", "SFT"]
)
def test_zero_is_one_process_with_twice_the_batch(run, name, lora, stage):
    assert_agree(run(name, True, stage, lora=lora), run(name, True, None, lora=lora))


# What names a cache of log-probs.
HASHES = """
import deepspeed, torch
from fastdaa.drop_in.trl.on_head import _hash_module

def hash_of(seed):
    with deepspeed.zero.Init():
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    assert all(weight.numel() == 0 for weight in module.parameters())
    return _hash_module(module)

deepspeed.init_distributed("gloo")
assert hash_of(0) == hash_of(0) != hash_of(1)
"""


# The head is whole around its own work alone.
PIECES = """
import torch
from fastdaa.drop_in.trl.head import add_head
from pieces import cut

model = cut(lambda core: add_head(core, keep=True))
sizes, note = model.watch()
for _ in range(2):
    ids = torch.arange(5)[None]
    loss = model.engine(input_ids=ids, labels=ids, fused_lm_head=True).loss
    note()
    model.engine.backward(loss)
    note()
    model.engine.step()
assert sizes == [0] * 8, sizes
"""


@pytest.mark.parametrize("script", [HASHES, PIECES], ids=["names of caches", "pieces of the head"])
def test_weights_in_pieces(trl, script):
    run_alone(script)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_from_its_checkpoint(run, stage):
    settings = {"save_strategy": "steps", "save_steps": 2}
    folder = run("DPO", True, stage, settings=settings)
    whole = load_file(folder / "final" / "model.safetensors")
    resumed = run("DPO", True, stage, settings=settings, resume=str(folder / "checkpoint-2"))
    weights = load_file(resumed / "final" / "model.safetensors")
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_close_to_fp32(run, stage):
    rows = rows_of(run("DPO", True, stage, settings={"bf16": True}))
    expected = rows_of(run("DPO", True, None))
    for row, wanted in zip(rows, expected, strict=True):
        if "loss" in row:
            assert row["loss"] == pytest.approx(wanted["loss"], abs=0.05)
