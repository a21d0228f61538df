"""Responses sampled token by token from a model, as generation does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fastdaa.study.language import Language
from fastdaa.study.world import World


def sample_responses(model: Any, world: World, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` responses at temperature 1, as many to each prompt as can be, in random order.

    Args:
        model: in evaluation mode, over the vocabulary of the language.

    Returns:
        ``[count]`` prompts, and ``[count, longest]`` ids padded after EOS.

    Raises:
        ValueError: the model wrote something that is no response.
    """
    language = world.language
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randperm(count, generator=generator) % language.prompts
    ids = generate_responses(model, language, prompts, generator)
    language.response_numbers(ids)
    return prompts, ids


@torch.no_grad()
def generate_responses(
    model: Any, language: Language, prompts: Tensor, generator: torch.Generator
) -> Tensor:
    """``[count, longest]`` ids padded after EOS: one response at temperature 1 to each prompt.

    Args:
        model: in evaluation mode, over the vocabulary of the language.
        prompts: ``[count]`` int64, one token each.
    """
    ids = torch.full((len(prompts), language.longest), language.pad)
    going = torch.ones(len(prompts), dtype=torch.bool)
    cache = DynamicCache(config=model.config)
    last = prompts
    for position in range(language.longest):
        logits = model(input_ids=last[:, None], past_key_values=cache, use_cache=True).logits
        probs = logits[:, -1].double().softmax(-1)
        last = torch.multinomial(probs, 1, generator=generator).squeeze(1)
        ids[going, position] = last[going]
        going &= last != language.eos
        if not going.any():
            break
    return ids
