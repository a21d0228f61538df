"""A small Llama from scratch, fine-tuned on all answers of the training pairs, good and bad."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

TokenSequence = tuple[list[int], int]
"""Token ids of prompt and answer, and how many of them are the prompt."""


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of about 0.3 million parameters with random weights, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # The usual 0.02 suits wide models; so narrow a one learns three times slower with it.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def sft_sequences(pairs: Dataset) -> list[TokenSequence]:
    """Both answers of every tokenised pair, each behind its prompt."""
    return [
        (row["prompt_ids"] + row[side], len(row["prompt_ids"]))
        for row in pairs
        for side in ("chosen_ids", "rejected_ids")
    ]


def fine_tune(
    model: LlamaForCausalLM,
    sequences: list[TokenSequence],
    *,
    epochs: int = 5,
    batch_size: int = 16,
    learning_rate: float = 5e-3,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> list[dict[str, float]]:
    """Minimises the cross-entropy of the answers' tokens; prompts are read, not learnt.

    Batches hold sequences of similar length, so that little of them is padding. AdamW, linear
    warm-up over 5 % of the steps, then cosine decay to 5 %.

    Args:
        on_step: called with the step, the number of steps, and the loss in nats a token.

    Returns:
        One row a step: ``step``, ``loss`` (nats a token), ``seconds`` since the start.
    """
    order = random.Random(seed)
    batches = [batch for _ in range(epochs) for batch in _batches(sequences, batch_size, order)]
    steps = len(batches)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, steps))
    model.train()
    log, start = [], time.perf_counter()
    for step, batch in enumerate(batches, 1):
        ids, positions, targets = _collate(batch)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        # Only positions that predict a token of an answer pass through the head.
        logits = model.lm_head(hidden.flatten(0, 1)[positions])
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        log.append({"step": step, "loss": value, "seconds": time.perf_counter() - start})
        on_step(step, steps, value)
    model.eval()
    return log


def _pace(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def _batches(
    sequences: list[TokenSequence], batch_size: int, order: random.Random
) -> Iterator[list[TokenSequence]]:
    """Batches of similar lengths in random order."""
    shuffled = order.sample(sequences, len(sequences))
    shuffled.sort(key=lambda sequence: len(sequence[0]))
    starts = list(range(0, len(shuffled), batch_size))
    order.shuffle(starts)
    for start in starts:
        yield shuffled[start : start + batch_size]


def _collate(batch: list[TokenSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids ``[S, L]``, flat positions ``[N]`` that predict, and targets ``[N]``.

    Padding comes after every real token, which causal attention never lets it reach: no mask.
    """
    longest = max(len(ids) for ids, _ in batch)
    rows = torch.zeros(len(batch), longest, dtype=torch.int64)
    positions: list[Any] = []
    for row, (ids, prompt) in enumerate(batch):
        rows[row, : len(ids)] = torch.tensor(ids)
        positions.append(torch.arange(prompt - 1, len(ids) - 1) + row * longest)
    flat = torch.cat(positions)
    return rows, flat, rows.flatten()[flat + 1]
