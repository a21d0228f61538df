"""The model of a case: random weights, the same in every process."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastdaa.benchmarks.step.cases import ModelShape

LORA_RANK = 16


class Parameters(NamedTuple):
    """Weights that take part in matrix products, each once a token."""

    body: int
    """Of attention and MLP, without norms, embeddings and head."""
    head: int
    """Vocabulary times hidden size, also where it is tied to the embedding."""


def parameters(shape: ModelShape) -> Parameters:
    """Counted from the sizes; adapters are not counted."""
    kv_width = shape.hidden // shape.heads * shape.kv_heads
    attention = 2 * shape.hidden * (shape.hidden + kv_width)
    layer = attention + 3 * shape.hidden * shape.intermediate
    return Parameters(shape.layers * layer, shape.vocab * shape.hidden)


def build(shape: ModelShape, device: str, seed: int, max_length: int) -> Any:
    """A Llama in fp32 with seeded weights; on CUDA drawn there, which takes no time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(2048, max_length),
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return LlamaForCausalLM(config).float()


def lora_config() -> Any:
    """Rank 16 on every linear layer but the head; peft starts adapters at zero effect."""
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )  # fmt: skip
