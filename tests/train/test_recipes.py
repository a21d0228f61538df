"""Every file of docs/recipes.md trains: options, formats of the datasets, what comes of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from meeting import meeting
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from word_files import WORDS, word_tokenizer

from fastdaa.data import load_pairs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
FILES = dict(re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", PAGE.read_text(), re.S))
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
ROWS = 24


def texts(seed):
    """Words without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        size = int(torch.randint(2, 6, (), generator=generator))
        picked = torch.randint(len(WORDS), (size,), generator=generator).tolist()
        yield " ".join(WORDS[i] for i in picked)


def said(role, content):
    return {"role": role, "content": content}


def ultrachat(words):
    turns = [said("user", words), said("assistant", f"w1 {words}")]
    return {"prompt": words, "prompt_id": "0", "messages": turns}


def ultrafeedback(words):
    sides = {
        side: [said("user", words), said("assistant", f"{word} {words}")]
        for side, word in (("chosen", "w1"), ("rejected", "w2"))
    }
    return {
        "prompt": words, "prompt_id": "0", **sides, "messages": sides["chosen"],
        "score_chosen": 8.0, "score_rejected": 3.0,
    }  # fmt: skip


def kto_mix(words):
    good = len(words) % 2 == 0
    answer = [said("assistant", f"{'w1' if good else 'w2'} {words}")]
    return {"prompt": [said("user", words)], "completion": answer, "label": good}


DATASETS = {
    "HuggingFaceH4/ultrachat_200k": (ultrachat, ["train_sft"]),
    "HuggingFaceH4/ultrafeedback_binarized": (ultrafeedback, ["train_prefs", "test_prefs"]),
    "trl-lib/kto-mix-14k": (kto_mix, ["train"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A tiny model that knows a chat template, and rows in the columns of the hub's datasets."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny_model(max_position_embeddings=2048).save_pretrained(folder / "model")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    for name, (row, splits) in DATASETS.items():
        for seed, split in enumerate(splits):
            words = texts(seed)
            lines = [json.dumps(row(next(words))) for _ in range(ROWS)]
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{split}-00000-of-00001.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def start(start_run, folder, tmp_path):
    """A started process of a command with a file of the page, made small."""

    def begin(command, name, *more, rank="0", out="out", **options):
        path = tmp_path / name
        path.write_text(FILES[name].replace("HuggingFaceH4/", f"{folder}/HuggingFaceH4/")
                        .replace("trl-lib/", f"{folder}/trl-lib/"))  # fmt: skip
        given = yaml.safe_load(path.read_text())
        argv = [*command.split(), "--config", str(path), "--model", str(folder / "model")]
        argv += ["--output_dir", str(tmp_path / out), "--use_cpu", *more]
        for option, value in (("eval_steps", 1), ("save_steps", 1), ("test_size", 4)):
            argv += [f"--{option}", str(value)] if option in given else []
        if "precompute_ref_log_probs" in given:
            argv += ["--ref_cache_dir", str(tmp_path / "cache")]
        log = tmp_path / f"log{rank}.txt"
        return start_run(argv=argv, log=str(log), **options)

    return begin


def finished(*processes):
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none",
         "--gradient_accumulation_steps", "2"]  # fmt: skip


def test_the_page_has_these_files():
    assert [*FILES] == [
        "sft.yaml", "dpo.yaml", "qlora.yaml", "fsdp.yaml", "simpo.yaml", "kto.yaml", "apa.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_commands_of_the_page_name_their_file(name):
    commands = re.findall(rf"^(.* --config {name}.*)$", PAGE.read_text(), re.M)
    assert commands, f"no command with {name}"


@pytest.mark.parametrize(
    ("command", "name"),
    [("sft", "sft.yaml"), ("train", "dpo.yaml"), ("train", "simpo.yaml"), ("train", "kto.yaml")],
    ids=lambda text: text.removesuffix(".yaml"),
)
def test_a_recipe_trains(start, folder, tmp_path, command, name):
    assert finished(start(command, name, *STEPS)) == [0]
    before = load_file(folder / "model" / "model.safetensors")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert "step 2/2" in (tmp_path / "log0.txt").read_text()


def test_qlora(start, tmp_path):
    pytest.importorskip("bitsandbytes")
    assert finished(start("train", "qlora.yaml", *STEPS)) == [0]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 32)


def test_fsdp_leaves_a_whole_model_and_continues(start, tmp_path):
    """Checkpoints are in shards; the finished model is one that everybody can read."""

    def both(*more, out):
        env = meeting(2)
        return finished(
            *(
                start("train", "fsdp.yaml", *STEPS, "--ddp_backend", "gloo", *more, rank=rank,
                      out=out, fsdp=True, env={**env, "RANK": rank, "LOCAL_RANK": rank})
                for rank in "01"
            )
        )  # fmt: skip

    assert both(out="whole") == [0, 0]
    assert not (tmp_path / "whole" / "checkpoint-1" / "model.safetensors").exists()
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(alone[key], value) for key, value in whole.items())
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-2")
    (tmp_path / "cut" / "model.safetensors").unlink()
    assert both("--resume_from_checkpoint", out="cut") == [0, 0]
    continued = load_file(tmp_path / "cut" / "model.safetensors")
    assert all(torch.equal(continued[key], value) for key, value in whole.items())
    cache = ["--precompute_ref_log_probs", "--ref_cache_dir", str(tmp_path / "cache")]
    assert both(*cache, out="cached") == [0, 0]
    cached = load_file(tmp_path / "cached" / "model.safetensors")
    assert all(torch.allclose(cached[key], value, atol=1e-6) for key, value in whole.items())


def test_apa(start, tmp_path):
    small = ["--iterations", "1", "--rollouts_per_iteration", "4", "--minibatch", "2"]
    small += ["--max_new_tokens", "4"]
    assert finished(start("online --pipeline", "apa.yaml", *small)) == [0]
    stages = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert stages >= {"sft", "reward", "online"}


@pytest.mark.parametrize("name", ["dpo.yaml", "simpo.yaml", "fsdp.yaml", "qlora.yaml"])
def test_pairs_are_read_as_what_they_are(folder, name):
    """A row of UltraFeedback: the common turns are the prompt, scores are left alone."""
    repository, split = yaml.safe_load(FILES[name])["dataset"].split("::")
    row = load_pairs(str(folder / repository), split=split)[0]
    assert [turn["role"] for turn in row["prompt"]] == ["user"]
    assert row["chosen"][0]["content"].startswith("w1")
