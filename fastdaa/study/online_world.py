"""One on-policy run in a world: the real loop, a learned reward, exact measures on the way."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from fastdaa.online.loop import OnlineTrainer
from fastdaa.online.types import Completions
from fastdaa.study.apa_fixed_point import apa_fixed_point
from fastdaa.study.closed_form import tilt
from fastdaa.study.enumeration import response_logps
from fastdaa.study.language import Language
from fastdaa.study.measures import measure
from fastdaa.study.online_plan import EXACT_STRENGTHS, ExactRun, OnlineRun
from fastdaa.study.presets import ModelSize, Preset
from fastdaa.study.sampling import generate_responses
from fastdaa.study.sft import Reference, load_kept, make_reference
from fastdaa.study.tilt import train_proxy
from fastdaa.study.world import World, make_world
from fastdaa.whole_file import whole_file

if TYPE_CHECKING:
    from fastdaa.study.columns import Row

_PROXY_FORMAT = 1


class WorldRollouts:
    """Responses token by token at temperature 1, as generation does it."""

    def __init__(self, language: Language) -> None:
        self.language = language

    def sample(self, model: Any, prompts: Sequence[Tensor], seed: int) -> Completions:
        """One response of every one-token prompt, all at once."""
        language = self.language
        generator = torch.Generator().manual_seed(seed)
        ids = generate_responses(model, language, torch.cat(list(prompts)), generator)
        lengths = (ids != language.pad).sum(1).tolist()
        completions = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        # A response of the greatest length is over by itself.
        return Completions(completions, torch.ones(len(ids), dtype=torch.bool))


class TableReward:
    """The reward of a response, looked up.

    Args:
        rewards: ``[P, R]``.
    """

    def __init__(self, language: Language, rewards: Tensor) -> None:
        self.language, self.rewards = language, rewards

    def score(
        self, prompt_ids: Sequence[Tensor], completion_ids: Sequence[Tensor], texts: Any = None
    ) -> Tensor:
        """``[S]`` fp32."""
        language = self.language
        ids = torch.full((len(completion_ids), language.longest), language.pad)
        for row, completion in zip(ids, completion_ids, strict=True):
            row[: len(completion)] = completion
        numbers = language.response_numbers(ids)
        return self.rewards[torch.cat(list(prompt_ids)), numbers].float()


class OnlineSetting(NamedTuple):
    """What the runs of one world share."""

    world: World
    reference: Reference
    proxy: Tensor
    """``[P, R]`` fp64 reward of the learned model; mean 0, unit deviation under the reference."""


@lru_cache(maxsize=1)
def online_setting(
    preset: Preset, size: ModelSize, seed: int, language: Language, references: Path
) -> OnlineSetting:
    """World, reference and proxy, from ``references`` where they are there, else made."""
    world = make_world(preset, seed, language)
    reference = make_reference(world, size, seed, references)
    given = [_PROXY_FORMAT, asdict(preset), asdict(size), seed, asdict(language)]
    digest = hashlib.sha256(json.dumps(given).encode()).hexdigest()[:8]
    file = references / f"proxy-{preset.name}-{seed}-{size.name}-{digest}.safetensors"
    if not file.is_file():
        proxy = train_proxy(world, reference, preset.pairs, seed)
        with whole_file(file) as partial:
            partial.write_bytes(save({"rewards": proxy.rewards.contiguous()}))
    return OnlineSetting(world, reference, load_kept(file, file)["rewards"])


def run_online(run: OnlineRun, references: str | Path) -> list[Row]:
    """Trains a policy from the reference; a row of the study's table for each evaluation.

    Beside the table's columns a row has ``proxy`` (expected proxy reward), ``ref_entropy`` (of the
    reference, nats a response), ``iteration``, ``series`` and ``whitened``; ``beta`` is the run's
    strength, ``checkpoint`` the optimiser step.

    Args:
        references: the folder where references and proxies are kept.
    """
    given = online_setting(run.preset, run.size, run.seed, run.language, Path(references))
    language = run.language
    rows: list[Row] = []
    began = time.perf_counter()

    def evaluate(trainer: OnlineTrainer) -> None:
        iteration = trainer.place.iteration
        if iteration % run.evaluate_every and iteration != run.iterations:
            return
        logps = response_logps(trainer.models.policy, given.world)
        rows.append(
            {
                "run": run.id,
                "checkpoint": trainer.place.steps,
                **_measured(given, logps),
                **_labels(run),
                "iteration": iteration,
                "fraction": iteration / run.iterations,
                "final": iteration == run.iterations,
                "seconds": time.perf_counter() - began,
            }
        )

    trainer = OnlineTrainer(
        copy.deepcopy(given.reference.model),
        WorldRollouts(language),
        TableReward(language, given.proxy),
        [torch.tensor(language.prompt_ids(prompt)) for prompt in range(language.prompts)],
        run.config(),
        evaluate=evaluate,
    )
    trainer.train()
    return rows


def run_exact(run: ExactRun, references: str | Path) -> list[Row]:
    """The policies that could be reached: APA's fixed points, and optima with a KL penalty.

    A row, a run of its own in the table, for each of ``EXACT_STRENGTHS``; the algorithms are
    ``apa_fixed_point`` (:func:`~fastdaa.study.apa_fixed_point.apa_fixed_point`) and ``kl_optimum``
    (:func:`~fastdaa.study.closed_form.tilt`, what PPO with a KL cost aims at).
    """
    given = online_setting(run.preset, run.size, run.seed, run.language, Path(references))
    ref_logps = given.reference.logps
    rows = []
    for strength in EXACT_STRENGTHS:
        end, _ = apa_fixed_point(run.language, ref_logps, given.proxy, strength)
        optimum = tilt(ref_logps, given.proxy, strength)
        for algorithm, logps in (("apa_fixed_point", end), ("kl_optimum", optimum)):
            name = f"{run.preset.name}-{algorithm}-l{strength:g}-s{run.seed}-{run.size.name}"
            rows.append(
                {
                    "run": name,
                    "checkpoint": 0,
                    **_measured(given, logps),
                    "preset": run.preset.name,
                    "algorithm": algorithm,
                    "series": algorithm,
                    "beta": strength,
                    "seed": run.seed,
                    "size": run.size.name,
                    "final": True,
                }
            )
    return rows


def _measured(given: OnlineSetting, logps: Tensor) -> Row:
    world, reference, proxy = given
    measures = measure(world, logps, reference.logps, reference.gold)
    ref_probs = reference.logps.exp()
    return {
        "ref_entropy": float(-(ref_probs * reference.logps).sum(1).mean()),
        "score": measures.gold,
        **measures._asdict(),
        "proxy": float((logps.exp() * proxy).sum(1).mean()),
    }


def _labels(run: OnlineRun) -> Row:
    return {
        "preset": run.preset.name,
        "algorithm": run.algorithm,
        "series": run.series,
        "whitened": run.whitened,
        "beta": run.strength,
        "seed": run.seed,
        "size": run.size.name,
        "lr": run.learning_rate,
    }
