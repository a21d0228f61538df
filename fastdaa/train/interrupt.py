"""Ctrl-C, SIGTERM and a closed terminal: finish the step, save a checkpoint, stop.

A second time: stop at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
import time
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SAME_REQUEST_SECONDS = 1.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOPPING = b"\n[fastdaa] stopping after this step, with a checkpoint; again: stop at once\n"


class Interrupt(TrainerCallback):
    """Turns the first SIGINT, SIGTERM or SIGHUP into a checkpoint and a clean end.

    The signal handlers are in place from the beginning of training to its end; call ``restore``
    where training ends with an exception. With several processes, all of them stop at the same
    step, whichever got the signal. In a thread other than the main one, where Python cannot
    receive signals, only the other processes' signals count.

    Attributes:
        interrupted: whether the last training ended because of a signal.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._requested = False
        self._asked_at = 0.0
        self._speaks = True
        self._previous: dict[int, Any] = {}
        self._flag: SharedFlag | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.interrupted = self._requested = False
        self._speaks = state.is_world_process_zero
        self._flag = SharedFlag(args.device) if args.world_size > 1 else None
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            # transformers' own answer to SIGTERM, where the user asked for it.
            if number == signal.SIGTERM and getattr(args, "enable_jit_checkpoint", False):
                continue
            self._previous[number] = signal.signal(number, self._receive)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        asked = self._requested if self._flag is None else self._flag.exchange(self._requested)
        # A run that ends with this step anyway is not interrupted.
        if asked and state.global_step < state.max_steps:
            self.interrupted = True
            control.should_log = True
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # The checkpoint was written at the end of the step; nothing is evaluated on the way out.
        if self.interrupted:
            control.should_evaluate = control.should_save = False
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Puts the signal handlers of before back; harmless if they already are."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested:
            # A launcher passes on the Ctrl-C that its workers got from the terminal, too.
            if now - self._asked_at < _SAME_REQUEST_SECONDS:
                return
            self.restore()
            raise KeyboardInterrupt
        self._requested, self._asked_at = True, now
        if self._speaks:
            with contextlib.suppress(OSError):  # a closed terminal
                # print() is not safe here: the signal may have come in the middle of another one.
                os.write(2, _STOPPING)
        if number == signal.SIGHUP:
            _leave_terminal()


def _leave_terminal() -> None:
    """What is still to be said goes nowhere: writing to a terminal that is gone is an error, which
    would end the run before its checkpoint."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


class SharedFlag:
    """A boolean that becomes true on every process once it is true on any.

    On CPU the answer is there at once. On an accelerator it is that of the call before, which has
    long been computed, so that nobody waits for the device; all processes get the same answer at
    the same call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: tuple[Tensor, torch.Event] | None = None

    def exchange(self, mine: bool) -> bool:
        """The flag of all processes, each of which must call this equally often."""
        if self._device.type == "cpu":
            flag = torch.full((1,), int(mine))
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            return bool(flag)
        before = self._pending
        flag = torch.full((1,), int(mine), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        host = torch.empty((1,), dtype=flag.dtype, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.Event(self._device)
        event.record()
        self._pending = (host, event)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0])


def was_interrupted(trainer: Any) -> bool:
    """Whether the last training of ``trainer`` ended because of a signal."""
    callbacks = trainer.callback_handler.callbacks
    return any(callback.interrupted for callback in callbacks if isinstance(callback, Interrupt))


def restore_signals(trainer: Any) -> None:
    """Undo the signal handlers of a training that ended, however it did."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Interrupt):
            callback.restore()
