"""``fastdaa train``: reads options, builds what they name, and calls the trainer."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdaa.cli.arguments import TrainArguments
    from fastdaa.train.config import PreferenceConfig

_INTERRUPTED = 130


def run(argv: Sequence[str]) -> int:
    """Trains as ``argv`` says; 0, or 130 where a signal stopped the run after a checkpoint."""
    from fastdaa.cli.arguments import parse

    arguments, config = parse(argv)
    with _log_lines(config.process_index == 0):
        code = _train(arguments, config, argv)
    _leave_process_group()
    return code


def _leave_process_group() -> None:
    """Its threads would abort a process that ends while they run."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _train(arguments: TrainArguments, config: PreferenceConfig, argv: Sequence[str]) -> int:
    from transformers import set_seed

    from fastdaa.cli import building
    from fastdaa.cli.summary import print_summary
    from fastdaa.cli.tracking import Tracking
    from fastdaa.train.interrupt import was_interrupted

    checkpoint = building.check_paths(arguments, config)
    tracking = Tracking(arguments, config)
    set_seed(config.seed)
    tokenizer = building.load_tokenizer(arguments)
    train_pairs, eval_pairs = building.load_datasets(arguments, config)
    tracking.load_pairs(eval_pairs)
    building.check_template(tokenizer, train_pairs)
    peft_config = building.lora_config(arguments)
    model = building.load_model(arguments.model, arguments)
    building.check_vocabulary(model, tokenizer)
    ref_model = None
    if arguments.ref_model is not None:
        ref_model = building.load_model(arguments.ref_model, arguments)
    trainer = _trainer_class()(
        model=model,
        ref_model=ref_model,
        args=config,
        train_dataset=train_pairs,
        eval_dataset=eval_pairs,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    tracking.attach(trainer)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        _print_continuation(trainer, config, argv)
        return _INTERRUPTED
    if was_interrupted(trainer):
        _print_continuation(trainer, config, argv)
        return _INTERRUPTED
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        print_summary(trainer.state.log_history, config)
        tracking.print_summary()
    return 0


def _trainer_class() -> Any:
    from fastdaa.train.trainer import PreferenceTrainer

    return PreferenceTrainer


def continuation(argv: Sequence[str], checkpoint: str | None) -> str:
    """The command that continues a stopped run, for a shell.

    Without a complete checkpoint it is the same command again.
    """
    kept: list[str] = []
    skip_value = False
    for argument in argv:
        name = argument.split("=")[0].replace("-", "_")
        if name == "__resume_from_checkpoint":
            skip_value = "=" not in argument
            continue
        if skip_value and not argument.startswith("--"):
            skip_value = False
            continue
        skip_value = False
        kept.append(argument)
    resume = [] if checkpoint is None else ["--resume_from_checkpoint"]
    return shlex.join([*_program(), "train", *kept, *resume])


def _program() -> list[str]:
    """How this process was started, as far as a user has to repeat it."""
    # Under a launcher the program is a module or script that the launcher starts.
    launched = "LOCAL_RANK" in os.environ
    return ["-m", "fastdaa.cli"] if launched else ["fastdaa"]


def _print_continuation(trainer: Any, config: PreferenceConfig, argv: Sequence[str]) -> None:
    from fastdaa.train.checkpoints import last_complete

    if not trainer.is_world_process_zero():
        return
    checkpoint = last_complete(str(config.output_dir))
    launcher = " with the same launcher" if "LOCAL_RANK" in os.environ else ""
    if checkpoint is None:
        print(f"\nInterrupted at step {trainer.state.global_step}, before any checkpoint.")
        print(f"To start again{launcher}:")
    else:
        print(f"\nInterrupted at step {trainer.state.global_step}; saved: {checkpoint}")
        print(f"To continue{launcher}:")
    print(f"  {continuation(argv, checkpoint)}")


@contextmanager
def _log_lines(main_process: bool) -> Iterator[None]:
    """Shows the library's own log lines on stderr, on other processes only warnings."""
    logger = logging.getLogger("fastdaa")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[fastdaa] %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if main_process else logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
