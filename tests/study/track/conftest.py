"""A tiny model with a tokenizer of words, pairs of text, and trainers on them."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from word_files import WORDS, word_tokenizer

from fastdaa.study.track import TrackSettings
from fastdaa.study.track.prompts import Prompt
from fastdaa.study.track.scoring import Sample
from fastdaa.train import PreferenceConfig, PreferenceTrainer
from fastdaa.train.callbacks import Curves

VOCAB = 4 + len(WORDS)
EOS = 2


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> Iterator[None]:
    """The Trainer collects garbage when it starts; it need not look through all imports."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@functools.cache
def _model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., LlamaForCausalLM]:
    """``tiny(vocabulary, seed, **config)``: a new model; the same seed, the same weights."""

    def build(vocabulary: int = VOCAB, seed: int = 0, **config: Any) -> LlamaForCausalLM:
        model = copy.deepcopy(_model(vocabulary, seed))
        model.config.update(config)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = config.get("attention_dropout", 0.0)
        return model

    return build


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def text_pairs() -> Callable[..., Dataset]:
    """``text_pairs(count, seed)``: pairs of random words."""

    def build(count: int = 12, seed: int = 0) -> Dataset:
        generator = torch.Generator().manual_seed(seed)

        def text() -> str:
            length = int(torch.randint(2, 7, (), generator=generator))
            picked = torch.randint(len(WORDS), (length,), generator=generator).tolist()
            return " ".join(WORDS[i] for i in picked)

        rows = [
            {"prompt": text(), "chosen": " " + text(), "rejected": " " + text()}
            for _ in range(count)
        ]
        return Dataset.from_list(rows)

    return build


@pytest.fixture(scope="session")
def settings() -> TrackSettings:
    return TrackSettings(prompts=6, max_new_tokens=5, batch_size=4)


TRAINER_OPTIONS = {"ref_model", "peft_config", "callbacks"}


@pytest.fixture
def make_trainer(
    tmp_path: Path,
    tiny: Callable[..., Any],
    text_pairs: Callable[..., Dataset],
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., PreferenceTrainer]:
    """``make_trainer(folder="out", model=None, **options)`` of the trainer and the config."""

    def make(folder: str = "out", model: Any = None, **options: Any) -> PreferenceTrainer:
        given = {name: options.pop(name) for name in TRAINER_OPTIONS & options.keys()}
        settings = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "beta": 0.1,
            "ref_cache_dir": str(tmp_path / "cache"),
            **options,
        }
        torch.manual_seed(0)
        trainer = PreferenceTrainer(
            tiny() if model is None else model,
            args=PreferenceConfig(**settings),
            train_dataset=text_pairs(),
            processing_class=tokenizer,
            **given,
        )
        # Drawing takes longer than the training here, and has tests of its own.
        trainer.remove_callback(Curves)
        return trainer

    return make


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """``make_sample(answer, reference, prompt)``."""

    def make(answer: str, reference: str = "", prompt: Any = "p", number: int = 0) -> Sample:
        return Sample(Prompt(number, [5], prompt, reference), answer, 1, True, 0.0, 0.0, 0.0)

    return make
