"""What ``fastdaa sft`` and ``fastdaa reward`` do around their trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastdaa.cli.arguments import trainer_config
from fastdaa.cli.options import option_parser, read_options
from fastdaa.cli.runs import command_run, train_and_save
from fastdaa.cli.summary import STAGE, print_run


def read_stage(
    command: str, kinds: tuple[Any, Any], what: str, argv: Sequence[str], *, title: str
) -> tuple[Any, Any]:
    """Reads a command line into what is built before the trainer, and its configuration.

    Args:
        command, kinds, what, title: as of :func:`~fastdaa.cli.options.option_parser`; ``kinds`` are
            the classes of both.

    Raises:
        ValueError: an unknown option or key, with the nearest valid one, or a bad value.
        OSError: the YAML file cannot be read.
    """
    parser = option_parser(command, kinds, what, title=title)
    (arguments,), values = read_options(parser, kinds, argv)
    return arguments, trainer_config(kinds[1], values, arguments)


def run_stage(
    command: str,
    parse: Callable[[Sequence[str]], tuple[Any, Any]],
    argv: Sequence[str],
    make_trainer: Callable[[Any, Any], tuple[Any, str | None]],
) -> int:
    """Trains as ``argv`` says; 0, or 130 where a signal stopped the run after a checkpoint.

    Args:
        command: the sub-command.
        parse: from its command line to arguments and configuration.
        make_trainer: from both of these to the trainer and the checkpoint to resume from.
    """
    from fastdaa.train.processes import run_together

    def run() -> int:
        arguments, config = parse(argv)
        with command_run(main_process=config.process_index == 0):
            trainer, checkpoint = make_trainer(arguments, config)
            code = train_and_save(command, trainer, checkpoint, argv)
            if code == 0 and trainer.is_world_process_zero():
                print_run(trainer, STAGE)
            return code

    return run_together(run)
