"""The reference: a tiny transformer, fine-tuned on the source, once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM

from fastdaa.study.enumeration import response_logps
from fastdaa.study.language import LANGUAGE, Language
from fastdaa.study.presets import ModelSize, size_of
from fastdaa.study.world import World
from fastdaa.whole_file import unfinished

# Whatever changes the reference that the same settings give has to change this.
FORMAT = 1
NEVER = -100.0
"""Logit bias of ids that no response contains; their probability is 0 in fp32."""


class Reference(NamedTuple):
    """A fine-tuned model and what follows from it."""

    model: PhiForCausalLM
    logps: Tensor
    """``[P, R]`` fp64, log-probs of all responses."""
    gold: Tensor
    """``[P, R]`` fp64, gold reward anchored to this model."""


def new_model(size: str | ModelSize, seed: int, language: Language = LANGUAGE) -> PhiForCausalLM:
    """A transformer with random weights: pre-LN, rotary positions, an output bias, no dropout.

    Phi is one of the families of transformers whose head has a bias. Here it keeps prompts and
    padding out of responses, so that all probability is on responses.

    Raises:
        ValueError: an unknown size.
    """
    size = size_of(size)
    config = PhiConfig(
        vocab_size=language.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 1.0,
        },
        max_position_embeddings=max(16, language.longest + 1),
        # The usual 0.02 suits wide models; so narrow ones learn several times slower with it.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=language.eos,
        pad_token_id=language.pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias[: language.prompts] = NEVER
        model.lm_head.bias[language.pad] = NEVER
    return model.eval()


def fine_tune(model: Any, world: World, seed: int) -> None:
    """Teach ``model`` the source of ``world``, in place: cross-entropy of the response's tokens.

    Adam, linear warm-up over 5 % of the steps, then cosine decay.

    Args:
        seed: of the data and their order.
    """
    preset, language = world.preset, world.language
    prompts, numbers = world.sft_sequences(preset.sft_samples, seed)
    targets = language.padded_completions()[numbers]
    # The last token is only predicted; what stands at padded positions reaches no scored one.
    inputs = torch.cat([prompts[:, None], targets[:, :-1]], dim=1)
    targets = targets.masked_fill(targets == language.pad, -100)
    count, size = len(inputs), preset.sft_batch_size
    steps = preset.sft_epochs * -(-count // size)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(count, generator=generator) for _ in range(preset.sft_epochs)]
    batches = [batch for order in orders for batch in order.split(size)]
    optimizer = torch.optim.Adam(model.parameters(), lr=preset.sft_learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, steps))
    model.train()
    for batch in batches:
        logits = model(input_ids=inputs[batch], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets[batch].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def excess_loss(world: World, logps: Tensor) -> float:
    """What the model's expected loss on new data exceeds the source's entropy by, nats a token.

    Exactly ``KL(source || model)`` over the expected number of scored tokens.
    """
    source = world.source_logps
    probs = source.exp()
    gap = torch.where(probs > 0, probs * (source - logps), 0.0).sum(1).mean()
    scored = (world.lengths + 1).clamp(max=world.language.longest).double()
    return float(gap / (probs @ scored).mean())


def make_reference(world: World, size: str | ModelSize, seed: int, folder: str | Path) -> Reference:
    """The fine-tuned reference, from ``folder`` if it is there, else trained and put there.

    The entry's name ends in a hash of all settings, so other settings never meet; it appears as a
    whole or not at all, and two processes may make it at once.

    Args:
        folder: where references are kept; created if missing.
        seed: of the initial weights and the data.

    Raises:
        ValueError: what is kept there cannot be read.
    """
    size = size_of(size)
    entry = Path(folder) / _entry_name(world, size, seed)
    if not (entry / "settings.json").is_file():
        model = new_model(size, seed, world.language)
        fine_tune(model, world, seed)
        _store(entry, model, response_logps(model, world), _settings(world, size, seed))
    model = new_model(size, seed, world.language)
    model.load_state_dict(load_kept(entry / "model.safetensors", entry))
    logps = load_kept(entry / "logps.safetensors", entry)["logps"]
    return Reference(model, logps, world.anchored(logps))


def load_kept(file: Path, whole: Path) -> dict[str, Tensor]:
    """The tensors of a file that a study has made once and keeps.

    Args:
        whole: what has to be deleted for it to be made again.

    Raises:
        ValueError: it cannot be read, e.g. because the disk was full or a copy broke off.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file}: expected tensors that a study keeps, got {error}; they are made again if "
            f"{whole} is deleted"
        ) from error


# What the source and the fine-tuning depend on; the reward and the preferences come later.
_PRESET_FIELDS = (
    *("violations", "stop", "favourites"),
    *("sft_samples", "sft_epochs", "sft_batch_size", "sft_learning_rate"),
)


def _settings(world: World, size: ModelSize, seed: int) -> dict[str, Any]:
    preset = asdict(world.preset)
    return {
        "format": FORMAT,
        "preset": {name: preset[name] for name in _PRESET_FIELDS},
        "language": asdict(world.language),
        "world_seed": world.seed,
        "size": asdict(size),
        "seed": seed,
    }


def _entry_name(world: World, size: ModelSize, seed: int) -> str:
    text = json.dumps(_settings(world, size, seed), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{world.preset.name}-{world.seed}-{size.name}-s{seed}-{digest}"


def _store(entry: Path, model: Any, logps: Tensor, settings: dict[str, Any]) -> None:
    with unfinished(entry, folder=True) as part:
        # As save_pretrained writes it, so that from_pretrained reads it, without its progress bars.
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(part)
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        save_file({"logps": logps.contiguous()}, part / "logps.safetensors")
        text = json.dumps(settings, indent=1, sort_keys=True)
        (part / "settings.json").write_text(text, encoding="utf-8")
        try:
            os.rename(part, entry)
        except OSError:
            # Another process was faster; its reference is the same.
            if not (entry / "settings.json").is_file():
                raise


def _pace(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
