"""One run: the project's own trainer in a world, measured exactly at its checkpoints."""

from __future__ import annotations

import copy
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdaa.outputs import PairLogps
from fastdaa.study.enumeration import response_logps
from fastdaa.study.language import Language
from fastdaa.study.measures import measure
from fastdaa.study.plan import Run
from fastdaa.study.preferences import HELD_OUT_SEED, TRAIN_SEED, Pairs, as_dataset, draw_pairs
from fastdaa.study.presets import ModelSize, Preset
from fastdaa.study.sft import Reference, make_reference
from fastdaa.study.world import World, make_world
from fastdaa.study.world_training import train_in_world

if TYPE_CHECKING:
    from datasets import Dataset

    from fastdaa.study.columns import Row


class Setting(NamedTuple):
    """What the runs of one world share."""

    world: World
    reference: Reference
    pairs: Dataset
    held_out: Pairs


@lru_cache(maxsize=1)
def setting(
    preset: Preset, size: ModelSize, seed: int, language: Language, references: Path
) -> Setting:
    """World, reference and pairs; the reference is made if ``references`` does not have it."""
    world = make_world(preset, seed, language)
    reference = make_reference(world, size, seed, references)
    logps, gold = reference.logps, reference.gold
    train = draw_pairs(world, logps, gold, preset.pairs, TRAIN_SEED)
    held_out = draw_pairs(world, logps, gold, preset.held_out_pairs, HELD_OUT_SEED)
    return Setting(world, reference, as_dataset(world, train), held_out)


def run_one(run: Run, references: str | Path) -> list[Row]:
    """Trains a policy from the reference; a row of the study's table for each checkpoint.

    Args:
        references: the folder where references are kept.
    """
    given = setting(run.preset, run.size, run.seed, run.language, Path(references))
    measuring = _Measuring(run, given)
    loss, hyperparameters = run.loss_settings
    train_in_world(
        copy.deepcopy(given.reference.model),
        given.pairs,
        run.preset,
        measuring,
        loss_type=[loss],
        loss_kwargs=dict(hyperparameters),
        optim="adamw_torch",
        seed=run.seed,
    )
    return measuring.rows


class _Measuring(TrainerCallback):
    """Measures the policy after the steps that the run names."""

    def __init__(self, run: Run, given: Setting) -> None:
        self.run, self.given = run, given
        self.rows: list[Row] = []
        self._began = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        run, step = self.run, state.global_step
        if step not in run.evaluated_steps:
            return
        world, reference = self.given.world, self.given.reference
        logps = response_logps(model, world)
        measures = measure(world, logps, reference.logps, reference.gold)
        self.rows.append(
            {
                "run": run.id,
                "checkpoint": step,
                "score": measures.gold,
                **measures._asdict(),
                **held_out_measures(run, self.given, logps),
                "length_r2_samples": length_r2_samples(world, logps, reference.logps),
                **_labels(run),
                "fraction": step / run.preset.steps,
                "final": step == run.evaluated_steps[-1],
                "seconds": time.perf_counter() - self._began,
            }
        )


def _labels(run: Run) -> Row:
    return {
        "preset": run.preset.name,
        "algorithm": "daa",
        "loss": run.loss,
        "beta": run.beta,
        "length_alpha": run.length_alpha,
        "seed": run.seed,
        "size": run.size.name,
        "lr": run.preset.learning_rate,
    }


def held_out_measures(run: Run, given: Setting, logps: Tensor) -> dict[str, float | None]:
    """Loss, implicit-reward accuracy and log-ratios on held-out pairs, from exact log-probs.

    Args:
        logps: ``[P, R]`` of the policy.
    """
    world, pairs = given.world, given.held_out
    ratio = logps - given.reference.logps
    chosen = ratio[pairs.prompts, pairs.chosen]
    rejected = ratio[pairs.prompts, pairs.rejected]
    # R-DPO counts tokens as the trainer scores them: EOS is one where there is one.
    scored = (world.lengths + 1).clamp(max=world.language.longest)
    lengths = scored[pairs.chosen], scored[pairs.rejected]
    zeros = torch.zeros_like(chosen)
    losses = run.objective()(
        PairLogps(chosen, rejected, *lengths), PairLogps(zeros, zeros, *lengths)
    )
    both = torch.cat([chosen, rejected])
    return {
        "loss_value": float(losses.mean()),
        "accuracy": float((chosen > rejected).double().mean()),
        "chosen_logratio": float(chosen.mean()),
        "rejected_logratio": float(rejected.mean()),
        "margin": float((chosen - rejected).mean()),
        "length_r2_pairs": r_squared(
            world.lengths[torch.cat([pairs.chosen, pairs.rejected])].double(),
            both,
            torch.ones_like(both),
        ),
    }


def length_r2_samples(world: World, logps: Tensor, ref_logps: Tensor) -> float | None:
    """R^2 of the log-ratio on the length over the policy's responses, exactly.

    Args:
        logps, ref_logps: ``[P, R]``.
    """
    lengths = world.lengths.double().expand_as(logps)
    return r_squared(lengths.flatten(), (logps - ref_logps).flatten(), logps.exp().flatten())


def r_squared(x: Tensor, y: Tensor, weights: Tensor) -> float | None:
    """Squared weighted correlation of ``x`` and ``y``, all ``[n]``; None if one is constant.

    This is the R^2 of the straight line through ``y`` over ``x``. Entries of weight 0 do not
    count, whatever their values.
    """
    counted = weights > 0
    x, y, weights = x[counted], y[counted], weights[counted]
    weights = weights / weights.sum()
    x, y = x - (weights * x).sum(), y - (weights * y).sum()
    variances = (weights * x * x).sum() * (weights * y * y).sum()
    if not variances > 0:
        return None
    return float((weights * x * y).sum() ** 2 / variances)
