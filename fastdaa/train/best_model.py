"""``load_best_model_at_end``: which checkpoint the model of a finished run is, and its numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastdaa.train.shown import shown_value

logger = logging.getLogger(__name__)


class BestModel(NamedTuple):
    """The checkpoint that was loaded at the end of a run."""

    step: int
    of: int
    """Steps that were trained."""
    metric: str
    """By which it was chosen."""
    value: float | None
    """Of the metric at that step."""
    greater: bool
    """Whether more of it is better."""

    def __str__(self) -> str:
        value = "" if self.value is None else f" {shown_value(self.metric, self.value):.4g}"
        better = "higher" if self.greater else "lower"
        return f"step {self.step} of {self.of}, best by {self.metric}{value} ({better} is better)"


def best_model(trainer: Any) -> BestModel | None:
    """What the Trainer has loaded at the end of its last training; None for the last step."""
    args, state = trainer.args, trainer.state
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    step = int(Path(state.best_model_checkpoint).name.rpartition("-")[2])
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    values = [row[metric] for row in state.log_history if row["step"] == step and metric in row]
    value = values[-1] if values else None
    return BestModel(step, state.global_step, metric, value, bool(args.greater_is_better))


def say_best_model(trainer: Any) -> None:
    """Log which checkpoint was loaded, or that there was none to load."""
    args, state = trainer.args, trainer.state
    best = best_model(trainer)
    if best is not None:
        logger.info("load_best_model_at_end: the model is that of %s", best)
    elif args.load_best_model_at_end:
        logger.warning(
            "load_best_model_at_end: no checkpoint was written at the best step%s; the model is "
            "that of the last step, %d",
            "" if state.best_global_step is None else f", {state.best_global_step}",
            state.global_step,
        )  # fmt: skip


def rows_of_saved(trainer: Any) -> Sequence[Mapping[str, Any]]:
    """The logged rows up to the step whose model is saved, and the summary of the whole run."""
    rows, best = trainer.state.log_history, best_model(trainer)
    if best is None:
        return rows
    return [row for row in rows if row["step"] <= best.step or "train_runtime" in row]
