"""A tiny Llama, and sequences of many lengths."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, EOS = 29, 2


@functools.cache
def _model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_policy() -> Callable[..., LlamaForCausalLM]:
    """``tiny_policy(seed=0)``: a new model, always with the same weights."""
    return lambda seed=0: copy.deepcopy(_model(seed))


@pytest.fixture(scope="session")
def sequences() -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    """``sequences(count, seed=0)``: prompts and completions of 1 to 9 tokens."""

    def build(count: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)

        def ids() -> Tensor:
            length = int(torch.randint(1, 10, (), generator=generator))
            return torch.randint(3, VOCAB, (length,), generator=generator)

        return [ids() for _ in range(count)], [ids() for _ in range(count)]

    return build
