"""One file of options for TRL's commands and for ours: the same rows are logged."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
import yaml
from word_files import WORDS, word_tokenizer

from fastdaa.cli import main

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
# What differs by design: docs/drop_in.md.
LEFT_OUT = {"num_tokens", "total_flos"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def texts(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        size = int(torch.randint(1, 9, (), generator=generator))
        picked = torch.randint(len(WORDS), (size,), generator=generator).tolist()
        yield " ".join(WORDS[i] for i in picked)


def said(role, content):
    return [{"role": role, "content": content}]


def rows(kind):
    found = []
    for index, (prompt, first, second) in enumerate(zip(*[iter(texts(36))] * 3, strict=True)):
        asked = said("user", prompt)
        chosen, rejected = said("assistant", f"w1 {first}"), said("assistant", f"w2 {second}")
        record = {
            "implicit": {"chosen": asked + chosen, "rejected": asked + rejected},
            "text": {"prompt": f"{prompt} ", "chosen": first, "rejected": f"w2 {second}"},
            "labelled": {"prompt": asked, "completion": chosen, "label": index % 3 == 0},
            "examples": {"prompt": asked, "completion": chosen},
            "plain": {"story": f"{prompt} {first}"},
        }[kind]
        found.append(record)
    return found


def logged(folder):
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    return state["log_history"]


CASES = {
    "dpo": ("dpo", "train", "implicit", {}),
    "evaluated": ("dpo", "train", "implicit", {
        "eval_strategy": "steps", "eval_steps": 2, "dataset_test_split": "test",
        # TRL takes the mean of the means of batches, whatever their sizes.
        "per_device_eval_batch_size": 12,
    }),
    "a mixture under LoRA": ("dpo", "train", "text", {
        "use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05,
        "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5],
    }),
    "cut texts": ("dpo", "train", "text", {
        "max_length": 9, "gradient_accumulation_steps": 2, "beta": 0.3, "loss_type": "aot",
    }),
    "kto": ("kto", "train", "labelled", {
        "loss_type": "kto", "train_sampling_strategy": "sequential", "desirable_weight": 1.0,
    }),
    "sft": ("sft", "sft", "examples", {"max_length": 12, "packing": False}),
    "plain text": ("sft", "sft", "plain", {"dataset_text_field": "story"}),
    "reward": ("reward", "reward", "implicit", {"lora_task_type": "SEQ_CLS"}),
}  # fmt: skip


@pytest.mark.usefixtures("trl")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("theirs", "ours", "kind", "options"), CASES.values(), ids=CASES)
def test_a_file_of_trl_gives_the_same_run(model, tmp_path, theirs, ours, kind, options) -> None:
    pytest.importorskip("peft")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        lines = "\n".join(map(json.dumps, rows(kind)))
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({
        "model_name_or_path": model, "dataset_name": str(tmp_path / "data"),
        "dataset_train_split": "train", "dtype": "float32", "model_revision": "main",
        "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_steps": 3, "save_steps": 3,
        "logging_steps": 1, "report_to": "none", "bf16": False, "use_cpu": True,
        "disable_tqdm": True, **options,
    }))  # fmt: skip
    script = importlib.import_module(f"trl.scripts.{theirs}")
    argv = ["--config", str(file), "--output_dir"]
    script.main(*script.make_parser().parse_args_and_config([*argv, str(tmp_path / "theirs")]))
    assert main([ours, *argv, str(tmp_path / "ours")]) == 0
    expected, found = logged(tmp_path / "theirs"), logged(tmp_path / "ours")
    assert len(found) == len(expected) >= 3
    for want, have in zip(expected, found, strict=True):
        names = want.keys() & have.keys() - LEFT_OUT
        names = {name for name in names if "second" not in name and "runtime" not in name}
        assert {"loss", "grad_norm"} <= names or "eval_loss" in names
        for name in names:
            assert have[name] == pytest.approx(want[name], rel=1e-4, abs=2e-6), name
