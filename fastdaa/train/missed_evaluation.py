"""An evaluation that a run was stopped before: made where the run goes on.

Ctrl-C saves a checkpoint without evaluating first, and a process may be killed while it evaluates.
The row would be missing, and with it what depends on it: the best checkpoint, early stopping, the
learning rate of ``reduce_lr_on_plateau``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from fastdaa.train import checkpoints
from fastdaa.train.metrics_writer import forget_evaluation, metrics_path, read_metrics

logger = logging.getLogger(__name__)


def evaluation_missed(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the step that a run goes on from was to be evaluated and, as it knows, was not."""
    step, by_steps = state.global_step, args.eval_strategy == IntervalStrategy.STEPS
    if step == 0 or args.eval_strategy == IntervalStrategy.NO:
        return False
    at = step if by_steps else (state.epoch or 0.0)
    due = step % state.eval_steps == 0 if by_steps else float(at).is_integer()
    due = due or step >= state.max_steps
    return due and args.eval_delay <= at and not _evaluated(state.log_history, step)


def _evaluated(rows: Sequence[Mapping[str, Any]], step: int) -> bool:
    return any(
        row.get("step") == step and any(name.startswith("eval_") for name in row)
        for row in reversed(rows)
    )


def make_up_evaluation(trainer: Any) -> None:
    """Evaluate as the Trainer would have done at the step that the run goes on from, if it is due.

    To be called by all processes, once, before the first step: the random states of the checkpoint
    are in place by then, and an evaluation draws from them.
    """
    args, state = trainer.args, trainer.state
    if not evaluation_missed(args, state):
        return
    _say(args, state)
    if state.is_world_process_zero:
        # The file may have it: of a process that was killed behind it, before a checkpoint.
        forget_evaluation(metrics_path(args), state.global_step)
    metrics = trainer._evaluate(None, None)
    if trainer._determine_best_metric(metrics=metrics, trial=None):
        checkpoint = checkpoints.folder(str(args.output_dir), state.global_step)
        if checkpoint.is_dir() and state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(checkpoint)


def make_up_last_evaluation(trainer: Any) -> None:
    """Evaluate where a run goes on from its last step and has no row of it in its file either.

    To be called by all processes, behind a training that had no step left. With
    ``load_best_model_at_end`` there is none to make up: no checkpoint is without its evaluation.
    """
    args, state = trainer.args, trainer.state
    missed = not args.load_best_model_at_end and evaluation_missed(args, state)
    if missed and state.is_world_process_zero:
        missed = not _evaluated(read_metrics(metrics_path(args)), state.global_step)
    if broadcast_object_list([missed])[0]:
        _say(args, state)
        trainer.evaluate()


def _say(args: TrainingArguments, state: TrainerState) -> None:
    if args.should_log:
        logger.info("evaluating at step %d, before which the run was stopped", state.global_step)
