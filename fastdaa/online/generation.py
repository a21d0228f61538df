"""Completions by ``generate`` of transformers, in batches of prompts of similar length."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedModel

from fastdaa.online.ranks import collect_objects, number, processes
from fastdaa.online.types import Completions
from fastdaa.train.backbone import causal_lm
from fastdaa.train.eval_mode import in_eval_mode
from fastdaa.validation import check_positive


class Sampling(NamedTuple):
    """How completions are drawn: from the policy itself, no top-k, no top-p, no penalties."""

    end_ids: tuple[int, ...]
    """Tokens that end a completion."""
    pad_id: int
    """Fills rows; masked, so any id of the vocabulary does."""
    max_new_tokens: int = 128
    """A completion is cut after so many tokens."""
    temperature: float = 1.0
    """Divisor of the logits."""


class TransformersRollouts:
    """A :class:`~fastdaa.online.types.RolloutSource` on the policy's own device.

    Prompts are sorted by length and padded on the left. The logits of a step are dropped with the
    step. Several processes take batches in turn.

    Args:
        sampling: how completions are drawn.
        batch_size: prompts that are answered at a time; fewer where processes would have none.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, sampling: Sampling, *, batch_size: int = 64) -> None:
        check_sampling(sampling)
        check_positive("batch_size", batch_size)
        self.sampling, self.batch_size = sampling, batch_size

    def sample(self, model: Any, prompts: Sequence[Tensor], seed: int) -> Completions:
        """One completion of every prompt; the same seed, prompts and weights give the same ones.

        Random numbers and the model's training mode are outside as if nothing had been drawn.
        """
        order = sorted(range(len(prompts)), key=lambda place: (len(prompts[place]), place))
        size = min(self.batch_size, max(1, math.ceil(len(order) / processes())))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        mine: dict[int, tuple[Tensor, bool]] = {}
        with undisturbed(model), torch.no_grad():
            for batch in range(number(), len(batches), processes()):
                asked = [prompts[place] for place in batches[batch]]
                # Weights are whole, if need be by the loop: nobody waits for the others.
                answers = sample_batch(
                    model, asked, self.sampling, seed=seed, batch=batch, synced=False
                )
                mine |= zip(batches[batch], answers, strict=True)
        found = {place: one for part in collect_objects(mine) for place, one in part.items()}
        drawn = [found[place] for place in range(len(prompts))]
        finished = torch.tensor([ended for _, ended in drawn], dtype=torch.bool)
        return Completions([ids for ids, _ in drawn], finished)


def check_sampling(sampling: Sampling) -> None:
    """Raise ``ValueError`` for numbers out of range."""
    check_positive("max_new_tokens", sampling.max_new_tokens)
    check_positive("temperature", sampling.temperature)


def sample_batch(
    model: nn.Module,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    *,
    seed: int,
    batch: int,
    synced: bool | None = None,
) -> list[tuple[Tensor, bool]]:
    """One completion a prompt, ``[n]`` int64 on the CPU, and whether it ended by itself.

    Call it within :func:`undisturbed`.

    Args:
        model: the policy, in any wrapping.
        prompts: ``[n]`` int64 each; padded on the left.
        batch: number of the batch: together with ``seed`` it seeds the random numbers, so that
            completions depend neither on what was drawn before nor on who computes which batch.
        synced: every rank generates until all are done (sharded models); None for transformers to
            decide.
    """
    seed_all(seed, batch)
    rows = _generate(model, prompts, sampling, synced)
    return [cut(row, sampling.end_ids) for row in rows]


def seed_all(*parts: int) -> None:
    """Random numbers of Python, NumPy and torch that depend on ``parts`` alone.

    Call it within :func:`undisturbed`.
    """
    mixed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def cut(ids: Tensor, end_ids: Sequence[int]) -> tuple[Tensor, bool]:
    """A row of generated tokens up to its first end, included, and whether it has one.

    What follows an end is padding.
    """
    ends = torch.isin(ids, torch.tensor(list(end_ids), dtype=ids.dtype)).nonzero()
    if not len(ends):
        return ids.clone(), False
    return ids[: int(ends[0]) + 1].clone(), True


def end_tokens(model: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """Tokens that end a completion, as model and tokenizer say."""
    core = causal_lm(model)
    given = [
        getattr(core.generation_config, "eos_token_id", None),
        core.config.get_text_config().eos_token_id,
        getattr(tokenizer, "eos_token_id", None),
    ]
    found = {token for entry in given for token in (entry if isinstance(entry, list) else [entry])}
    return tuple(sorted(token for token in found if token is not None))


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """``model`` is in eval mode, and random numbers drawn here are missed by nobody outside.

    Covered are Python, NumPy and torch on the CPU and on the model's device. Eval mode also
    switches activation checkpointing off, which would switch the generation cache off.
    """
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    # fork_rng wants a device type even where there is none to fork.
    kind = "cuda" if device.type == "cpu" else device.type
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with in_eval_mode(model), torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _generate(
    model: nn.Module, prompts: Sequence[Tensor], sampling: Sampling, synced: bool | None
) -> Tensor:
    """Generated tokens ``[prompts, most]`` on the CPU, padded behind their ends."""
    core = causal_lm(model)
    device = next(core.parameters()).device
    width = max(map(len, prompts))
    rows = torch.full((len(prompts), width), sampling.pad_id, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        rows[row, width - len(ids) :] = ids
        mask[row, width - len(ids) :] = 1
    config = GenerationConfig(
        do_sample=True,
        temperature=float(sampling.temperature),
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.end_ids) or None,
        pad_token_id=sampling.pad_id,
        use_cache=True,
    )
    with _own_generation_config(core, config), _whole_root(model, core), _finite_probabilities():
        generate: Any = core.generate
        output = generate(
            input_ids=rows.to(device), attention_mask=mask.to(device), generation_config=config,
            synced_gpus=synced,
        )  # fmt: skip
    generated: Tensor = output[:, width:].cpu()
    return generated


@contextlib.contextmanager
def _finite_probabilities() -> Iterator[None]:
    """In the words of a user; a GPU ends the process with an assertion of the device instead."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise FloatingPointError(
            "policy: expected finite probabilities of its tokens, got some that are infinite or "
            "not a number; if it was trained so far, a lower learning_rate may help"
        ) from error


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
