"""``fastdaa online`` in two processes over gloo, against one."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from command_process import start_command
from meeting import meeting
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from word_files import word_tokenizer, write_pairs_and_reward

from fastdaa.cli import main

REWARD = """
def count(prompts, completions):
    with open({calls!r}, "a") as file:
        print(len(completions), file=file)
    return [text.split().count("w3") - 0.1 * len(text.split()) for text in completions]

def fails(prompts, completions):
    import os
    if os.environ.get("RANK") == "1":
        raise OSError("no such service")
    return count(prompts, completions)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_pairs_and_reward(folder)
    (folder / "reward.py").write_text(REWARD.format(calls=str(folder / "calls")))
    return folder


def command(files, folder, **options):
    options = {
        "model": files / "model", "dataset": files / "pairs.jsonl", "output_dir": folder,
        "reward": f"{files / 'reward.py'}:count", "test_size": 3,
        "eval_rollouts": 6, "eval_steps": 2, "iterations": 3, "rollouts_per_iteration": 8,
        "minibatch": 3, "max_new_tokens": 5,
        # As many batches of prompts with one process as with two.
        "generation_batch_size": 2, "learning_rate": 0.01, "kl_lambda": 0.5, "seed": 1, **options,
    }  # fmt: skip
    return [
        "online",
        "--use_cpu",
        *(f"--{name}={value}" for name, value in options.items() if value is not None),
    ]


def start_two(files, folder, asked=None, **options):
    """Two processes of one command, as a launcher starts them; ``asked`` is its environment."""
    together, words = {**meeting(2), **(asked or {})}, command(files, folder, **options)
    said = [folder.with_name(f"{folder.name}_{rank}.txt") for rank in range(2)]
    own = [{**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [start_command(words, env, file) for env, file in zip(own, said, strict=True)]
    return processes, said


def end(started):
    """Exit codes and what was said."""
    processes, said = started
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes], [file.read_text() for file in said]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_alike(two, one):
    got, expected = (load_file(folder / "model.safetensors") for folder in (two, one))
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)
    assert len(rows_of(two)) == len(rows_of(one)) == 3
    for row, wanted in zip(rows_of(two), rows_of(one), strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            if "time" not in name and "per_second" not in name:
                assert row[name] == pytest.approx(value, abs=2e-4), (row["iteration"], name)


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "apa"},
        {"algorithm": "ppo", "critic": "shared", "reward_scaling": "running_std"},
        {"algorithm": "awr", "tokens_per_pack": 30, "use_peft": True, "lora_r": 2},
        {"fsdp": True, "tokens_per_pack": 30, "activation_checkpointing": True},
        {"algorithm": "ppo", "critic": "shared", "fsdp": True, "minibatch": 1},
        {"algorithm": "awr", "use_peft": True, "lora_r": 2, "fsdp": True},
    ],
    ids=["apa", "ppo", "awr-lora", "apa-fsdp", "ppo-fsdp", "awr-lora-fsdp"],
)
def test_two_processes_train_as_one_does(files, tmp_path, options):
    if "use_peft" in options:
        pytest.importorskip("peft")
    (files / "calls").unlink(missing_ok=True)
    codes, said = end(start_two(files, tmp_path / "two", **options))
    assert codes == [0, 0], said
    assert "reward of rollouts" in said[0] and said[1].strip() == ""
    scored = [*map(int, (files / "calls").read_text().split())]
    assert scored[:4] == [3, 3, 4, 4]  # held-out prompts, then rollouts
    ways = {"fsdp", "activation_checkpointing"}
    alone = {name: options[name] for name in options.keys() - ways}
    assert main(command(files, tmp_path / "one", **alone)) == 0
    name = "adapter_model.safetensors" if "use_peft" in options else "model.safetensors"
    for folder in (tmp_path / "two", tmp_path / "one"):
        (folder / name).replace(folder / "model.safetensors")
    assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    "more", [{}, {"fsdp": True}, {"fsdp": True, "use_peft": True, "lora_r": 2}],
    ids=["whole", "fsdp", "fsdp-lora"],
)  # fmt: skip
def test_stopped_together_and_continued_by_one(files, tmp_path, more):
    two = tmp_path / "two"
    started = start_two(
        files, two, iterations=200, save_steps=500, lr_scheduler_type="constant", **more
    )
    while not (two / "metrics.jsonl").is_file() or len(rows_of(two)) < 2:
        assert all(process.is_alive() for process in started[0])
        time.sleep(0.05)
    os.kill(started[0][1].pid, signal.SIGINT)
    codes, said = end(started)
    assert codes == [130, 130], said
    assert said[0].count("To continue with the same launcher:") == 1 and "continue" not in said[1]
    (checkpoint,) = two.glob("checkpoint-*")
    done = json.loads((checkpoint / "trainer_state.json").read_text())
    iterations = done["iteration"] + 1
    options = {"iterations": iterations, "lr_scheduler_type": "constant", "save_steps": 500}
    if "fsdp" in more:  # as it was begun, too
        shutil.copytree(two, tmp_path / "two_again")
        started = start_two(
            files, tmp_path / "two_again", resume_from_checkpoint=True, **options, **more
        )
        codes, said = end(started)
        assert codes == [0, 0], said
    options |= {name: value for name, value in more.items() if name != "fsdp"}
    assert main(command(files, two, resume_from_checkpoint=True, **options)) == 0
    assert main(command(files, tmp_path / "one", **options)) == 0
    weights = "adapter_model" if "use_peft" in more else "model"
    expected = load_file(tmp_path / "one" / f"{weights}.safetensors")
    for folder in tmp_path.glob("two*/"):
        got = load_file(folder / f"{weights}.safetensors")
        assert got.keys() == expected.keys()
        for name in got:
            torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)


def test_an_error_in_one_process_ends_all(files, tmp_path):
    failing = f"{files / 'reward.py'}:fails"
    codes, said = end(start_two(files, tmp_path / "out", reward=failing))
    assert codes == [2, 2], said
    assert "no such service" in said[1] and "error" not in said[0]


ALIKE = """
import sys
import torch
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from fastdaa.online.config import OnlineConfig
from fastdaa.online.models import prepare_models

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
policy = LlamaForCausalLM(LlamaConfig(vocab_size=24, intermediate_size=32, **sizes))
config = OnlineConfig(output_dir=None, disable_tqdm=True)
models = prepare_models(policy, None, None, config, 4)
whose = (models.policy.model, models.reference.model, models.critic.backbone)
print(*(float(model.layers[0].mlp.up_proj.weight.sum()) for model in whose))
dist.barrier()
"""


def test_new_weights_are_the_first_process_s_before_they_are_copied():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **meeting(2)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ALIKE], env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(said[0]) == 3 and len({*said[0], *said[1]}) == 1, said


def test_an_error_of_a_stage_is_said(files, tmp_path):
    options = {"pipeline": True, "reward": None, "test_size": 50}
    codes, said = end(start_two(files, tmp_path / "out", **options))
    assert codes == [2, 2]
    assert "".join(said).count("error: stage sft: test_size: expected fewer") == 1, said


def test_all_stages_in_two_processes(files, tmp_path):
    stage = json.dumps({"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01})
    options = {"pipeline": True, "sft_options": stage, "reward_options": stage}
    command = functools.partial(start_two, files, reward=None, **options)
    codes, said = end(command(tmp_path / "out"))
    assert codes == [0, 0], said
    for name in ("sft", "reward", "online"):
        assert (tmp_path / "out" / name / "stage.json").is_file()
        assert said[0].count(f"stage {name}") == 1
    assert len(rows_of(tmp_path / "out" / "online")) == 3
    assert "stage" not in said[1] and "[fastdaa]" not in said[1]
    codes, said = end(command(tmp_path / "out"))
    assert codes == [0, 0] and said[0].count("is done") == 3 and said[1] == ""


def test_what_several_processes_cannot_do(files, tmp_path, capsys, monkeypatch):
    for name, value in (("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main(command(files, tmp_path / "out", rollouts="vllm")) == 2
    assert "error: rollouts: expected transformers" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_accelerate_launch_is_asked_for(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # of one process: nothing
    assert main(command(files, tmp_path / "out", iterations=1)) == 0
    (saved,) = (tmp_path / "out").glob("checkpoint-*/online_config.json")
    saved = json.loads(saved.read_text())
    assert saved["bf16"] and not saved["fsdp"]
    for name, value in (("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)
    for name, value, message in (
        ("ACCELERATE_MIXED_PRECISION", "fp16", "expected no or bf16"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "got DEEPSPEED by `accelerate launch`"),
        ("FSDP_VERSION", "1", "fsdp_version: expected 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: expected false"),
    ):
        before = os.environ.get(name, "false")
        monkeypatch.setenv(name, value)
        assert main(command(files, tmp_path / "other")) == 2
        assert message in capsys.readouterr().err
        monkeypatch.setenv(name, before)


def test_fsdp_of_accelerate_launch(files, tmp_path):
    asked = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true",
    }  # fmt: skip
    codes, said = end(start_two(files, tmp_path / "out", asked=asked, iterations=1))
    assert codes == [0, 0], said
    (saved,) = (tmp_path / "out").glob("checkpoint-*/online_config.json")
    saved = json.loads(saved.read_text())
    assert saved["fsdp"] and saved["activation_checkpointing"]


def test_one_process_has_nothing_to_cut(files, tmp_path, capsys):
    assert main(command(files, tmp_path / "out", fsdp=True)) == 2
    assert "error: fsdp: expected several processes" in capsys.readouterr().err
