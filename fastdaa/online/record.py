"""What a run leaves behind and listens to: ``metrics.jsonl``, and the signals that end it early."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainerControl, TrainerState

from fastdaa.online.config import OnlineConfig
from fastdaa.online.ranks import number, processes
from fastdaa.train.interrupt import Interrupt
from fastdaa.train.metrics_writer import MetricsWriter


class Record:
    """Metrics and signals as the trainer of pairs has them.

    Without ``output_dir`` nothing is written, no checkpoint could be, and Ctrl-C is left to whoever
    started the run.

    Args:
        steps: optimiser steps that were done before; rows behind them are removed from the file.
    """

    def __init__(self, config: OnlineConfig, steps: int, device: torch.device) -> None:
        self._args = _arguments(config, device)
        self._state = TrainerState(
            global_step=steps, max_steps=config.total_steps, is_world_process_zero=number() == 0
        )
        self._control = TrainerControl()
        self._files = config.output_dir is not None
        self._writer, self._interrupt = MetricsWriter(), Interrupt()
        if self._files:
            self._writer.on_train_begin(self._args, self._state, self._control)
            self._interrupt.on_train_begin(self._args, self._state, self._control)

    @property
    def interrupted(self) -> bool:
        """Whether the run has been told to stop, and knows."""
        return self._interrupt.interrupted

    def asked(self, steps: int) -> bool:
        """Whether to stop after that many steps; never where they were the last ones."""
        if self._files:
            self._state.global_step = steps
            self._interrupt.on_step_end(self._args, self._state, self._control)
        return self.interrupted

    def write(self, steps: int, metrics: Mapping[str, Any]) -> None:
        """A row of the metrics."""
        if self._files:
            self._state.global_step = steps
            self._writer.on_log(self._args, self._state, self._control, logs=metrics)

    def close(self) -> None:
        """Gives the signals back."""
        self._interrupt.restore()


def _arguments(config: OnlineConfig, device: torch.device) -> Any:
    """What the two callbacks read of training arguments."""
    return SimpleNamespace(output_dir=config.output_dir, world_size=processes(), device=device)
