"""Files for commands: pairs of words, a tokenizer that knows them, a reward; and command lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(20)]
REWARD = "def count(prompts, completions):\n    return [t.count('w3') * 1.0 for t in completions]"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, four special ones before them."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def write_pairs_and_reward(folder: Path) -> None:
    """12 pairs whose chosen completion has the word ``w3``, and a reward that counts it."""
    generator = torch.Generator().manual_seed(0)

    def text(size: int) -> str:
        picked = torch.randint(len(WORDS), (size,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in picked)

    rows = [
        {"prompt": text(3), "chosen": f" w3 {text(2)}", "rejected": f" {text(4)}"}
        for _ in range(12)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text(REWARD)


def write_checkpoint(folder: Path, state: str) -> Path:
    """A checkpoint of the Trainer, as far as one can tell without loading it."""
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text(state)
    return folder


def write_pairs(path: Path, count: int) -> list[dict[str, str]]:
    """Pairs of many lengths, which it also returns; the first of more are the same."""
    generator = torch.Generator().manual_seed(0)

    def text() -> str:
        length = int(torch.randint(1, 8, (), generator=generator))
        picked = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in picked)

    rows = [
        {"prompt": text(), "chosen": f" w1 {text()}", "rejected": f" w2 {text()}"}
        for _ in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return rows


def command_line(files: Path, command: str, model: Any, out: Any, **options: Any) -> list[str]:
    """A command over the pairs; options of None are left out."""
    given = {"model": model, "dataset": files / "pairs.jsonl", "output_dir": out, "use_cpu": True}
    if command == "online":
        given |= {
            "iterations": 2, "rollouts_per_iteration": 6, "minibatch": 3, "max_new_tokens": 4,
            "disable_tqdm": True, "reward": f"{files}/reward.py:count", "learning_rate": 0.01,
        }  # fmt: skip
    else:
        given |= {"per_device_train_batch_size": 4, "report_to": "none", "logging_steps": 1}
    chosen = {name: value for name, value in {**given, **options}.items() if value is not None}
    return [command, *(f"--{name}={value}" for name, value in chosen.items())]
