"""``metrics.jsonl``: every logged row of a run, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

METRICS_FILE = "metrics.jsonl"
_SUMMARY_KEY = "train_runtime"


class MetricsWriter(TrainerCallback):
    """Appends every logged row to ``<output_dir>/metrics.jsonl`` and flushes it.

    A row holds ``step``, the logged values, and ``time`` in seconds since the epoch. NaN and
    infinities become null. The last row of a finished run holds ``train_runtime``. A resumed run
    first removes the rows behind its checkpoint and the summaries of earlier parts; a fresh run
    keeps an old file as ``metrics.1.jsonl``, ``metrics.2.jsonl`` and so on. Only the main process
    writes.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = metrics_path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        if state.global_step > 0:
            truncate_metrics(path, state.global_step)
        else:
            _put_aside(path)

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
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")


def metrics_path(args: TrainingArguments) -> Path:
    """Where the rows of a run with these arguments are."""
    return Path(str(args.output_dir)) / METRICS_FILE


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, without a line that was cut off; none without the file."""
    return [row for _, row in _lines(Path(path))]


def truncate_metrics(path: Path, step: int) -> None:
    """Removes rows behind ``step``, and summaries, from the file at once."""
    if not path.is_file():
        return
    kept = [
        line for line, row in _lines(path) if row.get("step", 0) <= step and _SUMMARY_KEY not in row
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            # A process that is killed may leave half a line.
            continue
        if isinstance(row, dict):
            yield line + "\n", row


def _put_aside(path: Path) -> None:
    if not path.is_file() or path.stat().st_size == 0:
        return
    number = 1
    while (kept := path.with_name(f"metrics.{number}.jsonl")).exists():
        number += 1
    path.rename(kept)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
