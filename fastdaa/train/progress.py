"""A progress bar with the numbers that matter, and one readable line a logged row."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastdaa.train.shown import shown_as

# Key, name in a line, format.
_LINE = (
    ("loss", "loss", ".4f"),
    ("rewards/margins", "margin", ".4f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("kl/token", "kl/token", ".2e"),
    ("grad_norm", "grad norm", ".3g"),
    ("learning_rate", "lr", ".2e"),
    ("throughput/tokens_per_second", "tokens/s", ",.0f"),
)
_POSTFIX = (
    ("loss", "loss", ".4f"),
    ("rewards/margins", "margin", ".4f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("throughput/tokens_per_second", "tokens/s", ",.0f"),
)
_BAR_COLUMNS = 76
"""Columns that name, counts and times of a bar take, and the bar itself to be one."""


class Progress(TrainerCallback):
    """One bar for training, one for evaluation, and a line for every logged row.

    The bars are on stderr, only on a terminal and unless ``disable_tqdm`` is set; the lines are on
    stdout. Only the main process shows anything.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._evaluation_bar: Any = None
        self._postfix: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._close_bar()  # of a training that has failed
            self._bar = _bar(args, state.max_steps, "training")
            self._bar.update(state.global_step)
            self._postfix = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self._evaluation_bar is None:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self._evaluation_bar = _bar(args, total, "evaluation", leave=False)
        self._evaluation_bar.update(1)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close_evaluation()

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        self._close_evaluation()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self._close_evaluation()
        line = format_row(logs, state.global_step, state.max_steps)
        if self._bar is not None and "train_runtime" in logs:
            # Finished: below the bar, which would be drawn once more behind the line.
            self._close_bar()
        elif self._bar is not None:
            self._postfix |= dict(_cells(logs, _POSTFIX))
            columns = shutil.get_terminal_size().columns
            self._bar.set_postfix(fitting(self._postfix, columns), refresh=False)
        if line:
            # Clears the bar, prints above it, draws it again.
            tqdm.write(line, file=sys.stdout)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close_bar()

    def _close_evaluation(self) -> None:
        if self._evaluation_bar is not None:
            self._evaluation_bar.close()
            self._evaluation_bar = None


def format_row(logs: Mapping[str, Any], step: int, max_steps: int) -> str:
    """One line for a logged row; empty if the row has none of the values that lines show."""
    place = f"step {step}/{max_steps}" if max_steps > 0 else f"step {step}"
    if "train_runtime" in logs:
        return f"{place}  trained for {logs['train_runtime']:,.1f} s"
    if any(key.startswith("eval_") for key in logs):
        logs = {key.removeprefix("eval_"): value for key, value in logs.items()}
        place += "  evaluation"
    elif "epoch" in logs:
        place += f"  epoch {logs['epoch']:.2f}"
    cells = "  ".join(f"{name} {value}" for name, value in _cells(logs, _LINE))
    return f"{place}  {cells}" if cells else ""


def fitting(cells: Mapping[str, str], columns: int) -> dict[str, str]:
    """The first of ``cells`` that fit behind a bar on a terminal of so many columns."""
    kept: dict[str, str] = {}
    left = columns - _BAR_COLUMNS
    for name, value in cells.items():
        left -= len(f", {name}={value}")
        if left < 0:
            break
        kept[name] = value
    return kept


def use_progress(trainer: Any) -> None:
    """Puts :class:`Progress` in the place of transformers' bar and printer.

    The table that transformers shows in notebooks stays.
    """
    removed = [trainer.pop_callback(kind) for kind in (ProgressCallback, PrinterCallback)]
    if any(callback is not None for callback in removed):
        trainer.add_callback(Progress)


def _cells(
    logs: Mapping[str, Any], columns: tuple[tuple[str, str, str], ...]
) -> list[tuple[str, str]]:
    return [
        (name, shown_as(key, logs[key], spec))
        for key, name, spec in columns
        if isinstance(logs.get(key), int | float)
    ]


def _bar(args: TrainingArguments, total: int | None, what: str, leave: bool = True) -> Any:
    # None: tqdm shows nothing where stderr is no terminal, such as in a log file.
    disable = True if args.disable_tqdm else None
    return tqdm(total=total, desc=what, leave=leave, disable=disable, dynamic_ncols=True)
