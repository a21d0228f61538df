"""How the policy does on prompts that it is not trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdaa.online.experience import raw_scores, sample
from fastdaa.online.packs import make_packs
from fastdaa.online.rewards import sequence_sums
from fastdaa.online.scoring import score_tokens
from fastdaa.online.types import Completions
from fastdaa.train.backbone import causal_lm
from fastdaa.validation import check_positive

if TYPE_CHECKING:
    from fastdaa.online.loop import OnlineTrainer

_TOKENS_PER_PACK = 8192


class HeldOut:
    """An ``evaluate`` of :class:`~fastdaa.online.loop.OnlineTrainer`: held-out prompts, answered.

    Logged are, of the policy, ``eval/scores`` (mean reward as its source gives it, neither scaled
    nor with penalties), ``eval/kl`` (mean over completions of log policy - log reference, nats),
    ``eval/length``, ``eval/finished``; and ``eval/ref_scores``, the mean reward of the reference's
    own completions.

    Args:
        prompts: ``[n]`` int64 each.
        every: iterations between two measurements; the last one is measured, too.
        seed: of the completions, always the same, so that measurements differ by the policy alone.

    Raises:
        ValueError: no prompt, or ``every`` below 1.
    """

    def __init__(self, prompts: Sequence[Tensor], *, every: int = 10, seed: int = 0) -> None:
        check_positive("every", every)
        if not len(prompts):
            raise ValueError("prompts: expected at least one to evaluate on, got none")
        self.prompts, self.every, self.seed = list(prompts), every, seed
        self._ref_score: float | None = None

    def __call__(self, trainer: OnlineTrainer) -> dict[str, float]:
        """The measurement, where it is due; else nothing."""
        iteration = trainer.place.iteration
        if iteration % self.every and iteration != trainer.config.iterations:
            return {}
        return self.measure(trainer)

    def measure(self, trainer: OnlineTrainer) -> dict[str, float]:
        """Completions of the policy as it is now."""
        began = time.perf_counter()
        policy, reference, _ = trainer.models
        if self._ref_score is None:
            self._ref_score = self._score(trainer, self._sample(trainer, reference))
        completions = self._sample(trainer, policy)
        lengths = torch.tensor([len(ids) for ids in completions.completion_ids])
        packs = make_packs(
            self.prompts, completions.completion_ids,
            tokens_per_pack=trainer.config.tokens_per_pack or _TOKENS_PER_PACK,
            attention=trainer.config.attention, device=causal_lm(policy).device,
        )  # fmt: skip
        logps = [
            score_tokens(model, packs, lengths, temperature=trainer.config.temperature).logps
            for model in (policy, reference)
        ]
        return {
            "eval/scores": self._score(trainer, completions),
            "eval/ref_scores": self._ref_score,
            "eval/kl": float(sequence_sums(logps[0] - logps[1], lengths).mean()),
            "eval/length": float(lengths.double().mean()),
            "eval/finished": float(completions.finished.double().mean()),
            "time/eval": time.perf_counter() - began,
        }

    def _sample(self, trainer: OnlineTrainer, model: nn.Module) -> Completions:
        return sample(trainer.sources[0], model, self.prompts, self.seed)

    def _score(self, trainer: OnlineTrainer, completions: Completions) -> float:
        scores = raw_scores(trainer.sources[1], self.prompts, completions, trainer.tokenizer)
        return float(scores.double().mean())
