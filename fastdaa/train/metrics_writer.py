"""``metrics.jsonl``: every logged row of a run, one JSON object a line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdaa.train.json_lines import json_lines, put_aside, replace_text

METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"
_SUMMARY_KEY = "train_runtime"


class MetricsWriter(TrainerCallback):
    """Appends every logged row to ``<output_dir>/metrics.jsonl`` and flushes it.

    A row holds ``step``, the logged values, and ``time`` in seconds since the epoch. NaN and
    infinities become null. A run that logs every so many steps logs its last step as well; the last
    row of a finished run holds ``train_runtime``. A resumed run first removes the rows behind its
    checkpoint and the summaries of earlier parts; a fresh run keeps an old file as
    ``metrics.1.jsonl``, ``metrics.2.jsonl`` and so on, and its picture as ``curves.1.png``. An
    evaluation before the first training of a process belongs to that run. Only the main process
    writes.
    """

    def __init__(self) -> None:
        self._began = False
        self._before: list[str] = []
        """Lines of this process from before its first training."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = metrics_path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        if 0 < state.max_steps <= state.global_step:
            return  # nothing is left to do
        if state.global_step > 0:
            truncate_metrics(path, state.global_step)
        else:
            _put_aside(path, "".join(self._before))
        self._began, self._before = True, []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # Or a run shorter than an interval would leave no row.
        if args.logging_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_log = True
        return control

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
        row = {"step": state.global_step, **logs, "time": time.time()}
        values = {key: _plain(value) for key, value in row.items()}
        path = metrics_path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(values, allow_nan=False) + "\n"
        if not self._began:
            self._before.append(line)
        with path.open("a", encoding="utf-8") as file:
            file.write(line)


def metrics_path(args: TrainingArguments) -> Path:
    """Where the rows of a run with these arguments are."""
    return Path(str(args.output_dir)) / METRICS_FILE


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, without a line that was cut off; none without the file."""
    return [row for _, row in json_lines(Path(path))]


def truncate_metrics(path: Path, step: int) -> None:
    """Removes rows behind ``step``, and summaries, from the file at once."""
    if not path.is_file():
        return
    kept = [
        line
        for line, row in json_lines(path)
        if row.get("step", 0) <= step and _SUMMARY_KEY not in row
    ]
    replace_text(path, "".join(kept))


def forget_evaluation(path: Path, step: int) -> None:
    """Removes the rows of evaluations at ``step`` from the file at once."""
    rows = [
        (line, row.get("step") == step and any(name.startswith("eval_") for name in row))
        for line, row in json_lines(path)
    ]
    if any(evaluation for _, evaluation in rows):
        replace_text(path, "".join(line for line, evaluation in rows if not evaluation))


def _put_aside(path: Path, ours: str) -> None:
    """Give what an earlier run has drawn and logged a number.

    Args:
        path: of the rows.
        ours: the last lines, which belong to the new run and stay.
    """
    if ours and path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text == ours:
            return
        replace_text(path, text.removesuffix(ours))
    put_aside([path, path.with_name(CURVES_FILE)])
    if ours:
        replace_text(path, ours)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
