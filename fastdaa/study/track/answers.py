"""Batches of prompts to samples: answers of the policy and their statistics under both models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdaa.online.generation import Sampling, sample_batch, undisturbed
from fastdaa.study.track.prompts import Prompt, PromptSet
from fastdaa.study.track.scoring import Sample
from fastdaa.study.track.sequence_kl import answer_pack, answer_statistics
from fastdaa.study.track.settings import TrackSettings
from fastdaa.train.references import Reference


@dataclass(frozen=True)
class Subject:
    """A policy as it is at the moment, and what it is compared with."""

    model: nn.Module
    """With ``install_head_task``, in any wrapping that ``run_head_task`` takes."""
    reference: Reference
    tokenizer: Any
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Mixed precision of a forward, e.g. autocast."""
    max_bytes: int | None = None
    synced: bool = False
    """Whether forwards are collective, so that all ranks generate equally long."""

    @property
    def pad_id(self) -> int:
        """Padding, always masked."""
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if isinstance(value, int):
                return value
        return 0


def share_of_rank(
    count: int, rank: int, ranks: int, *, equally_many: bool
) -> list[tuple[int, bool]]:
    """Which of ``count`` batches a rank computes, and whether the result is used.

    With ``equally_many`` a rank that would have fewer than the others repeats batch 0 in vain.
    """
    mine = [(batch, True) for batch in range(rank, count, ranks)]
    if equally_many:
        mine += [(0, False)] * (-(-count // ranks) - len(mine))
    return mine


def answer(
    subject: Subject,
    prompts: PromptSet,
    settings: TrackSettings,
    *,
    rank: int = 0,
    ranks: int = 1,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[Sample]:
    """The rank's share of the samples, in any order.

    Args:
        advance: called with a number of prompts when they are done.
    """
    batches = prompts.batches(settings.batch_size)
    found: list[Sample] = []
    with undisturbed(subject.model):
        for batch, used in share_of_rank(len(batches), rank, ranks, equally_many=subject.synced):
            samples = _answer_batch(subject, batches[batch], prompts.end_ids, settings, batch)
            if used:
                found += samples
                advance(len(samples))
    return found


def _answer_batch(
    subject: Subject,
    prompts: Sequence[Prompt],
    end_ids: Sequence[int],
    settings: TrackSettings,
    batch: int,
) -> list[Sample]:
    ids = [torch.tensor(prompt.ids) for prompt in prompts]
    sampling = Sampling(
        tuple(end_ids), subject.pad_id, settings.max_new_tokens, settings.temperature
    )
    device = next(subject.model.parameters()).device
    with subject.precision():
        answers = sample_batch(
            subject.model, ids, sampling, seed=settings.seed, batch=batch, synced=subject.synced
        )
        pack = answer_pack(ids, [answer for answer, _ in answers], subject.pad_id, device)
        statistics = answer_statistics(
            subject.model,
            lambda pack: subject.reference.score(pack, keep_rows=True),
            pack,
            temperature=settings.temperature,
            max_bytes=subject.max_bytes,
        )
    # The token that ends an answer is no part of its text, special or not.
    texts = [answer[:-1] if finished else answer for answer, finished in answers]
    return [
        Sample(
            prompt=prompt,
            answer=str(subject.tokenizer.decode(text, skip_special_tokens=True)),
            tokens=len(tokens),
            finished=finished,
            k1=k1,
            rb=rb,
            entropy=entropy,
        )
        for prompt, (tokens, finished), text, k1, rb, entropy in zip(
            prompts, answers, texts, *(values.tolist() for values in statistics), strict=True
        )
    ]
