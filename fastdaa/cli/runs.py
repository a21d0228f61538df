"""What the training commands share around a run: log lines, Ctrl-C, and how to go on."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastdaa.cli.option_names import named_as

INTERRUPTED = 130
# Locks of folders, until the command ends.
_held: list[Any] = []
_staying: ContextVar[bool] = ContextVar("staying", default=False)


@contextmanager
def command_run(*, main_process: bool = True) -> Iterator[None]:
    """A run of a command: shows log lines, calls what the head refuses by the option's name, and
    leaves the process group where there is one."""
    try:
        with log_lines(main_process=main_process), named_as(max_bytes="head_max_bytes"):
            yield
    finally:
        _held.clear()
    if not _staying.get():
        _leave_process_group()


def check_whole_models(*names: str) -> None:
    """Raise ``ValueError`` for a launcher that wants models cut into pieces.

    Args:
        names: of the ways of cutting that a command does not know; none for all.
    """
    from accelerate.utils import parse_flag_from_env

    for name in names or ("FSDP", "DEEPSPEED"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"expected processes that each hold the whole model, got {name} by `accelerate "
                "launch`; start with `accelerate launch --multi_gpu` or `torchrun`"
            )


@contextmanager
def staying_together() -> Iterator[None]:
    """Commands that run in here leave the process group to the one behind them."""
    token = _staying.set(True)
    try:
        yield
    finally:
        _staying.reset(token)
    _leave_process_group()


def hold_folder(folder: str) -> None:
    """Keep other runs out of an output folder until the command ends; the first process does.

    Raises:
        BlockingIOError: another process writes into it.
    """
    from fastdaa.train.folder_lock import lock_folder

    if os.environ.get("RANK", "0") == "0":
        _held.append(lock_folder(folder))


class _Prefixed(logging.Formatter):
    """Says on every line, not the first alone, who speaks."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"[fastdaa] {line}" for line in super().format(record).splitlines())


@contextmanager
def no_bars_in_files() -> Iterator[None]:
    """Keeps the bars of transformers for loading and saving out of what is no terminal."""
    from transformers.utils import logging as bars

    if sys.stderr.isatty() or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


@contextmanager
def log_lines(*, main_process: bool = True) -> Iterator[None]:
    """Shows the library's own log lines on stderr, on other processes only warnings, and none about
    the data, which are the same for all."""
    logger = logging.getLogger("fastdaa")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Prefixed())
    if not main_process:
        handler.addFilter(lambda record: not record.name.startswith("fastdaa.data"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if main_process else logging.WARNING)
    logger.propagate = False
    try:
        with no_bars_in_files(), warnings.catch_warnings():
            # peft 0.21 reads this property of transformers 5 models by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            # Of GPT-2, whose hidden states nothing changes in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def train_and_save(command: str, trainer: Any, checkpoint: str | None, argv: Sequence[str]) -> int:
    """Trains and saves the model; 130 where a signal stopped the run, with the way to go on.

    Raises:
        OSError: the memory or the disk is full.
        FloatingPointError: the loss, the gradient or the weights are no longer finite.
    """
    from fastdaa.train.full_disk import full_disk_named

    with full_disk_named(str(trainer.args.output_dir), "what the run writes"):
        return _train_and_save(command, trainer, checkpoint, argv)


def _train_and_save(command: str, trainer: Any, checkpoint: str | None, argv: Sequence[str]) -> int:
    import torch

    from fastdaa.train.interrupt import was_interrupted

    at_once = False
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        at_once = True
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OSError(
            f"the memory of the device is full after step {trainer.state.global_step}: expected a "
            f"--tokens_per_pack that fits (now {trainer.args.tokens_per_pack or 'a whole batch'}), "
            f"--activation_checkpointing, or --use_peft; {error}"
        ) from error
    if at_once or was_interrupted(trainer):
        if trainer.is_world_process_zero():
            folder, step = str(trainer.args.output_dir), trainer.state.global_step
            print_continuation(command, argv, folder, f"step {step}")
        if not at_once:
            # Or a launcher would end the process that prints with the first of the others.
            trainer.accelerator.wait_for_everyone()
        return INTERRUPTED
    trainer.save_model()
    return 0


def print_continuation(command: str, argv: Sequence[str], output_dir: str, where: str) -> None:
    """Says where a run was interrupted, and the command that continues it."""
    from fastdaa.train.checkpoint_files import defect
    from fastdaa.train.checkpoints import last_complete

    checkpoint = last_complete(output_dir)
    why = None if checkpoint is None else defect(checkpoint)
    launcher = " with the same launcher" if _launched() else ""
    if why is not None:
        print(
            f"\nInterrupted at {where}; saved: {checkpoint}, which {why}: the run cannot go on "
            "from it, but a new one can start with it as its --model"
        )
        return
    if checkpoint is None:
        print(f"\nInterrupted at {where}, before any checkpoint.\nTo start again{launcher}:")
    else:
        print(f"\nInterrupted at {where}; saved: {checkpoint}\nTo continue{launcher}:")
    print(f"  {continuation(command, argv, checkpoint)}", flush=True)


def continuation(command: str, argv: Sequence[str], checkpoint: str | None) -> str:
    """The command that continues a stopped run, for a shell; without a checkpoint the same."""
    kept: list[str] = []
    skip_value = False
    for argument in argv:
        if argument.split("=")[0].replace("-", "_") == "__resume_from_checkpoint":
            skip_value = "=" not in argument
            continue
        if skip_value and not argument.startswith("--"):
            skip_value = False
            continue
        skip_value = False
        kept.append(argument)
    program = ["-m", "fastdaa.cli"] if _launched() else ["fastdaa"]
    resume = [] if checkpoint is None else ["--resume_from_checkpoint"]
    return shlex.join([*program, command, *kept, *resume])


def _launched() -> bool:
    """Whether this process is a module or script that a launcher has started."""
    return "LOCAL_RANK" in os.environ


def _leave_process_group() -> None:
    """Its threads would abort a process that ends while they run."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
