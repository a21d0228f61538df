"""Tiny models, pairs and TRL trainers on them, the same for TRL's class and for ours."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
IN_ORDER = {"train_sampling_strategy": "sequential"}
SAMPLED = {
    "num_generations": 2, "max_completion_length": 6, "temperature": 0.7,
    # Adam would make steps of full size from gradients that are nothing but rounding.
    "adam_epsilon": 1e-4,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "DPO": {"beta": 0.3, **IN_ORDER}, "KTO": {"beta": 0.3, **IN_ORDER}, "SFT": IN_ORDER,
    "GRPO": SAMPLED, "RLOO": SAMPLED,
}  # fmt: skip
"""What each trainer has beside the settings that are common to all."""


@pytest.fixture(scope="session")
def trl() -> Iterator[Any]:
    """The package, if it is one that the drop-in trainers fit."""
    pytest.importorskip("trl", reason="TRL is not installed")
    version = importlib.metadata.version("trl")
    if version.split(".")[:2] != ["1", "16"]:
        pytest.skip(f"fastdaa.drop_in.trl fits TRL 1.16, not {version}")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl
        from trl.trainer import (  # noqa: F401 - loaded here, where warnings are off
            DPOTrainer,
            GRPOTrainer,
            KTOTrainer,
            RLOOTrainer,
            SFTTrainer,
        )
    # Every trainer collects garbage before it trains. Over all modules that would take longer
    # than a test's training.
    gc.collect()
    gc.freeze()
    yield trl
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word, ``w0`` to ``w39``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


@pytest.fixture(scope="session")
def texts() -> Dataset:
    """12 pairs of many lengths."""
    generator = torch.Generator().manual_seed(0)

    def text(longest: int) -> str:
        length = int(torch.randint(1, longest, (), generator=generator))
        picked = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in picked)

    return Dataset.from_list(
        [{"prompt": text(9), "chosen": " " + text(9), "rejected": " " + text(9)} for _ in range(12)]
    )


@pytest.fixture(scope="session")
def new_model() -> Callable[..., transformers.PreTrainedModel]:
    """``new_model(family="Llama", seed=0, **config)``: equal calls, equal weights."""

    def build(
        family: str = "Llama", seed: int = 0, **overrides: Any
    ) -> transformers.PreTrainedModel:
        sizes = {
            "vocab_size": len(WORDS) + len(SPECIAL), "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 64, "initializer_range": 0.3, "tie_word_embeddings": False,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        config = getattr(transformers, f"{family}Config")(**{**sizes, **overrides})
        torch.manual_seed(seed)
        return getattr(transformers, f"{family}ForCausalLM")(config)

    return build


def even_share(completions: list[str], **columns: Any) -> list[float]:
    """A reward that asks for words of even numbers."""
    words = [[int(word[1:]) for word in text.split() if word[:1] == "w"] for text in completions]
    return [sum(number % 2 == 0 for number in row) / max(len(row), 1) for row in words]


@pytest.fixture(scope="session")
def data(texts: Dataset) -> dict[str, Dataset]:
    """What each trainer learns from, by its name."""
    prompts = texts.select_columns(["prompt"])
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in texts
        for side in ("chosen", "rejected")
    ]
    # Of unequal weight, so that both sides of a loss show.
    unpaired = Dataset.from_list(rows).select([i for i in range(24) if i % 6 != 3])
    answers = unpaired.remove_columns("label")
    return {"DPO": texts, "KTO": unpaired, "SFT": answers, "GRPO": prompts, "RLOO": prompts}


@pytest.fixture
def make_trainer(
    trl: Any,
    tokenizer: transformers.PreTrainedTokenizerFast,
    data: dict[str, Dataset],
    new_model: Callable[..., transformers.PreTrainedModel],
    tmp_path: Path,
) -> Callable[..., Any]:
    """``make_trainer(name, trainer_class, model=None, settings={}, **options)``: any trainer."""

    def make(
        name: str, trainer_class: Any, model: Any = None, settings: Any = None, **options: Any
    ) -> Any:
        config = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2,
            "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none",
            "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "dataloader_pin_memory": False, "disable_tqdm": True,
            **SETTINGS[name], **(settings or {}),
        }  # fmt: skip
        if name in ("GRPO", "RLOO"):
            options = {"reward_funcs": even_share, **options}
        return trainer_class(
            new_model() if model is None else model,
            args=getattr(trl, f"{name}Config")(**config),
            **{"train_dataset": data[name], "processing_class": tokenizer, **options},
        )

    return make


@pytest.fixture
def make_dpo(make_trainer: Callable[..., Any]) -> Callable[..., Any]:
    """``make_dpo(trainer_class, model=None, settings={}, **options)``: a trainer on 12 pairs."""
    return functools.partial(make_trainer, "DPO")


@pytest.fixture(scope="session")
def drop_in(trl: Any) -> Any:
    """The module with the drop-in's trainers."""
    import fastdaa.drop_in.trl

    return fastdaa.drop_in.trl


@pytest.fixture(scope="session")
def ours(drop_in: Any) -> Any:
    """The drop-in's trainer for pairs."""
    return drop_in.DPOTrainer


@pytest.fixture
def saved(
    new_model: Callable[..., transformers.PreTrainedModel], tmp_path: Path
) -> Callable[..., transformers.PreTrainedModel]:
    """A model that TRL can load its reference from."""

    def build(**options: Any) -> transformers.PreTrainedModel:
        model = new_model(**options)
        model.save_pretrained(tmp_path / "model")
        model.config._name_or_path = str(tmp_path / "model")
        return model

    return build


@pytest.fixture
def adapter() -> Callable[[bool], dict[str, Any]]:
    """``adapter(wanted)``: arguments of a trainer that make a small LoRA adapter, or none."""

    def arguments(wanted: bool) -> dict[str, Any]:
        if not wanted:
            return {}
        peft = pytest.importorskip("peft", reason="peft is not installed")
        return {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"])}

    return arguments


@pytest.fixture(scope="session")
def liger() -> Any:
    """Liger's own losses."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    version = importlib.metadata.version("liger-kernel")
    if tuple(map(int, version.split(".")[:2])) != (0, 8):
        pytest.skip(f"the classes follow liger-kernel 0.8, not {version}")
    from liger_kernel import chunked_loss

    return chunked_loss
