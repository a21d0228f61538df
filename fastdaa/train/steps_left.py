"""How many steps a run that goes on has left: none, some, or fewer than it has behind it."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from fastdaa.counted import counted
from fastdaa.train.zero3 import whole_size

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from fastdaa.train.packed_config import PackedConfig

logger = logging.getLogger(__name__)
_STATE_FILE = "trainer_state.json"
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")


class NothingLeft(TrainerCallback):
    """Writes, evaluates and saves nothing anew where a run goes on from its end.

    Else it does so as often as it is told now: the Trainer would go on with the ``logging_steps``,
    ``eval_steps`` and ``save_steps`` of the checkpoint.
    """

    _began = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = state.global_step
        state.compute_steps(args, state.max_steps)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step == self._began:
            control.should_log = control.should_evaluate = control.should_save = False
        return control


def steps_of(args: PackedConfig, rows: int) -> int:
    """Optimiser steps of a run over ``rows`` rows, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * _steps_of_epoch(args, rows))


def sharing_processes(args: PackedConfig) -> int:
    """How many batches of ``args.train_batch_size`` are trained on at once."""
    split = getattr(args.accelerator_config, "split_batches", False)
    return 1 if split else args.world_size


def _steps_of_epoch(args: PackedConfig, rows: int) -> int:
    """Optimiser steps of one pass over ``rows`` rows."""
    batches = rows / (args.train_batch_size * sharing_processes(args))
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def say_plan(args: PackedConfig, rows: int, unit: str, model: nn.Module) -> None:
    """Log what a run will do: steps, rows of a step, epochs, and how much is trained.

    Args:
        unit: what rows are called.
    """
    steps = steps_of(args, rows)
    accumulated, processes = args.gradient_accumulation_steps, sharing_processes(args)
    product = str(args.train_batch_size)
    product += f" x {accumulated} accumulated" if accumulated > 1 else ""
    product += f" x {processes} processes" if processes > 1 else ""
    logger.info(
        "plan: steps %s, %s a step %s%s, epochs %.3g of %s, trained parameters %s",
        f"{steps:,}", unit, f"{args.train_batch_size * accumulated * processes:,}",
        f" ({product})" if " " in product else "", steps / _steps_of_epoch(args, rows),
        counted(rows, unit.removesuffix("s")),
        f"{sum(whole_size(p) for p in model.parameters() if p.requires_grad):,}",
    )  # fmt: skip


def check_steps(checkpoint: str, args: PackedConfig, steps: int) -> None:
    """Compare the steps of a run with those of the checkpoint that it goes on from.

    Says where there is nothing left to do, and where another number of steps moves the schedule.

    Raises:
        ValueError: the checkpoint has more.
    """
    state = json.loads((Path(checkpoint) / _STATE_FILE).read_text(encoding="utf-8"))
    done, before = state["global_step"], state.get("max_steps", steps)
    if done > steps:
        asked = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        raise ValueError(
            f"{asked}: expected at least the {counted(done, 'step')} of {checkpoint}, got {steps}; "
            "give more steps, or start a new run with that checkpoint as its model"
        )
    if done == steps:
        logger.info("nothing left to train: %s is of the last step, %d", checkpoint, steps)
        return
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if before != steps and schedule not in _ENDLESS:
        logger.warning(
            "the schedule %s ended at step %d and ends at step %d now: the learning rate jumps",
            schedule, before, steps,
        )  # fmt: skip
