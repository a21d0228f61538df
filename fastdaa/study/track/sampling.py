"""Answers sampled from a policy in the middle of its training, which notices nothing."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedModel

from fastdaa.study.track.settings import TrackSettings
from fastdaa.train.backbone import causal_lm


class Answer(NamedTuple):
    """One sampled completion."""

    ids: list[int]
    """Its tokens, the one that ends it included."""
    finished: bool
    """Whether it ended by itself, and was not cut at ``max_new_tokens``."""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """``model`` is in eval mode, and random numbers drawn here are missed by nobody outside.

    Covered are Python, NumPy and torch on the CPU and on the model's device. Eval mode also
    switches activation checkpointing off, which would switch the generation cache off.
    """
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        for module in training:
            module.training = False
        with torch.random.fork_rng(devices, device_type=_accelerator(device)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module in training:
            module.training = True


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: TrackSettings,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    batch: int,
    synced: bool = False,
) -> list[Answer]:
    """One answer a prompt, from the distribution of the policy itself: no top-k, no top-p.

    Call it within :func:`undisturbed`.

    Args:
        model: the policy, in any wrapping.
        prompts: token ids; padded on the left.
        end_ids: tokens that end an answer.
        pad_id: fills the rows; masked.
        batch: number of the batch: together with ``settings.seed`` it seeds the random numbers, so
            that answers depend neither on the step nor on who computes which batch.
        synced: every rank generates until all are done (sharded models).
    """
    core = causal_lm(model)
    device = next(core.parameters()).device
    width = max(map(len, prompts))
    rows = [[pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    config = GenerationConfig(
        do_sample=True,
        temperature=float(settings.temperature),
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    _seed(settings.seed, batch)
    with _own_generation_config(core, config), _whole_root(model, core):
        generate: Any = core.generate
        output = generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
            synced_gpus=synced,
        )
    return [_cut(ids, end_ids) for ids in output[:, width:].tolist()]


def _seed(seed: int, batch: int) -> None:
    mixed = int(np.random.SeedSequence([seed, batch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def _cut(ids: list[int], end_ids: Sequence[int]) -> Answer:
    """The answer up to its end; what follows is padding."""
    for place, token in enumerate(ids):
        if token in end_ids:
            return Answer(ids[: place + 1], True)
    return Answer(ids, False)


@contextlib.contextmanager
def _own_generation_config(core: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    # `generate` fills what a configuration leaves open from the model's, such as a repetition
    # penalty: then the samples would not be the policy's.
    before = core.generation_config
    core.generation_config = config
    try:
        yield
    finally:
        core.generation_config = before


@contextlib.contextmanager
def _whole_root(model: nn.Module, core: PreTrainedModel) -> Iterator[None]:
    """The parameters that FSDP2 keeps in the outermost module, which ``core`` passes by.

    That is so with adapters: the PEFT model is the root, and generation calls what it wraps.
    """
    if not isinstance(model, FSDPModule) or model is core:
        yield
        return
    # FSDP2 settles in the first forward which module is the root.
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=core.device), use_cache=False)
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def _accelerator(device: torch.device) -> str:
    # fork_rng wants a device type even where there is none to fork.
    return "cuda" if device.type == "cpu" else device.type
