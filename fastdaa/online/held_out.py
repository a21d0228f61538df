"""How the policy does on prompts that it is not trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdaa.online.experience import raw_scores, sample
from fastdaa.online.generation import seed_all, undisturbed
from fastdaa.online.packs import packs_of_process
from fastdaa.online.rewards import sequence_sums
from fastdaa.online.scoring import score_tokens
from fastdaa.online.types import Completions, RewardSource
from fastdaa.train.backbone import causal_lm
from fastdaa.validation import check_positive

if TYPE_CHECKING:
    from fastdaa.online.loop import OnlineTrainer

_TOKENS_PER_PACK = 8192


class HeldOut:
    """An ``evaluate`` of :class:`~fastdaa.online.loop.OnlineTrainer`: held-out prompts, answered.

    Logged are, of the policy, ``eval/scores`` (mean reward as its source gives it, neither scaled
    nor with penalties), ``eval/kl`` (mean over completions of log policy - log reference, nats),
    both with ``_stderr``, the standard error over prompts; ``eval/length``, ``eval/finished``; and
    ``eval/ref_scores``, the mean reward of the reference's own completions. With ``gold`` also
    ``eval/gold``, ``eval/gold_stderr`` and ``eval/ref_gold``, the same by that second reward.

    Args:
        prompts: ``[n]`` int64 each.
        every: iterations between two measurements; the last one is measured, too.
        seed: of the completions (and of rewards that are random), always the same, so that
            measurements differ by the policy alone.
        gold: a reward that is not trained on, to see when the one that is gets exploited.

    Raises:
        ValueError: no prompt, or ``every`` below 1.
    """

    def __init__(
        self,
        prompts: Sequence[Tensor],
        *,
        every: int = 10,
        seed: int = 0,
        gold: RewardSource | None = None,
    ) -> None:
        check_positive("every", every)
        if not len(prompts):
            raise ValueError("prompts: expected at least one to evaluate on, got none")
        self.prompts, self.every, self.seed = list(prompts), every, seed
        self.gold = gold
        self._reference: dict[str, float] = {}

    def __call__(self, trainer: OnlineTrainer) -> dict[str, float]:
        """The measurement, where it is due; else nothing."""
        iteration = trainer.place.iteration
        if iteration % self.every and iteration != trainer.config.iterations:
            return {}
        return self.measure(trainer)

    def begin(self, trainer: OnlineTrainer) -> None:
        """The reference's scores, once: a reward that fails does so before the first iteration."""
        if not self._reference:
            with trainer.models.as_reference() as reference:
                completions = self._sample(trainer, reference)
            scores = self._scores(trainer, completions)
            self._reference = {
                f"eval/ref_{name}": float(values.mean()) for name, values in scores.items()
            }

    def measure(self, trainer: OnlineTrainer) -> dict[str, float]:
        """Completions of the policy as it is now."""
        began = time.perf_counter()
        policy = trainer.models.policy
        self.begin(trainer)
        completions = self._sample(trainer, policy)
        lengths = torch.tensor([len(ids) for ids in completions.completion_ids])
        packs = packs_of_process(
            self.prompts, completions.completion_ids,
            tokens_per_pack=trainer.config.tokens_per_pack or _TOKENS_PER_PACK,
            attention=trainer.config.attention, device=causal_lm(policy).device,
            in_step=trainer.config.fsdp,
        )  # fmt: skip
        temperature = trainer.config.temperature
        logps = [score_tokens(policy, packs, lengths, temperature=temperature).logps]
        with trainer.models.as_reference() as reference:
            logps.append(score_tokens(reference, packs, lengths, temperature=temperature).logps)
        scores = self._scores(trainer, completions)
        scores["kl"] = sequence_sums(logps[0] - logps[1], lengths).cpu()
        found: dict[str, float] = {}
        for name, values in scores.items():
            found[f"eval/{name}"] = float(values.mean())
            error = self._stderr(values)
            if error is not None:
                found[f"eval/{name}_stderr"] = error
        return {
            **found,
            **self._reference,
            "eval/length": float(lengths.double().mean()),
            "eval/finished": float(completions.finished.double().mean()),
            "time/eval": time.perf_counter() - began,
        }

    def _sample(self, trainer: OnlineTrainer, model: nn.Module) -> Completions:
        return sample(trainer.sources[0], model, self.prompts, self.seed)

    def _scores(self, trainer: OnlineTrainer, completions: Completions) -> dict[str, Tensor]:
        """``[n]`` fp64 by each reward; one that draws random numbers gets the same ones."""
        sources = {"scores": trainer.sources[1]}
        if self.gold is not None:
            sources["gold"] = self.gold
        device = causal_lm(trainer.models.policy).device
        with undisturbed(trainer.models.policy):
            seed_all(self.seed)
            return {
                name: raw_scores(source, self.prompts, completions, trainer.tokenizer, device)
                for name, source in sources.items()
            }

    def _stderr(self, values: Tensor) -> float | None:
        """Standard error of the mean of ``values [n]``; None for a single prompt.

        Completions of one prompt are not independent, so their errors are added up first.
        """
        groups: dict[tuple[int, ...], float] = {}
        for ids, error in zip(self.prompts, (values - values.mean()).tolist(), strict=True):
            key = tuple(ids.tolist())
            groups[key] = groups.get(key, 0.0) + error
        if len(groups) < 2:
            return None
        squares = sum(error * error for error in groups.values())
        return (squares * len(groups) / (len(groups) - 1)) ** 0.5 / len(values)
