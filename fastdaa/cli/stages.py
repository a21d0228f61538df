"""What the commands of the stages share: reading options, log lines, how to go on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from fastdaa.cli.arguments import TrainArguments, _build, _Formatter, _or_none, _Parser
from fastdaa.cli.building import _split
from fastdaa.cli.yaml_defaults import apply_yaml, nearest_option

if TYPE_CHECKING:
    from datasets import Dataset

INTERRUPTED = 130
_TRAINER_HELP = " Every option of transformers.TrainingArguments is here under its own name, too."
_CONFIG_HELP = (
    " A YAML file given with --config holds defaults, under the same names, that options on the "
    "command line override."
)


@dataclass
class StageArguments(TrainArguments):
    """What a stage builds before it calls its trainer: a model, data, and no reference."""

    ref_model: str | None = field(init=False, default=None)


def parse_options(
    command: str, kinds: Sequence[Any], argv: Sequence[str], what: str
) -> tuple[list[Any], dict[str, Any]]:
    """Reads a command line into dataclasses.

    Args:
        command: the sub-command.
        kinds: dataclasses; the first holds what is built, the last the configuration.
        argv: behind the command.
        what: one sentence for ``--help``.

    Returns:
        One object a dataclass, but for the last, and all values for that.

    Raises:
        ValueError: an unknown option or key, with the nearest valid one, or a bad value.
        OSError: the YAML file cannot be read.
    """
    parser = stage_parser(command, kinds, what)
    early = _Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    path = early.parse_known_args(list(argv))[0].config
    if path is not None:
        apply_yaml(parser, Path(path))
    for given in (text.split("=")[0] for text in argv if text.startswith("--")):
        if given not in parser._option_string_actions:
            raise ValueError(f"unknown option {given!r}{nearest_option(parser, given[2:], '--')}")
    namespace, rest = parser.parse_known_args(list(argv))
    if rest:
        raise ValueError(f"expected options such as --model, got {rest[0]!r}")
    values = vars(namespace)
    return [_build(kind, values) for kind in kinds[:-1]], values


def stage_parser(command: str, kinds: Sequence[Any], what: str) -> _Parser:
    """The parser of all options of a command."""
    trainer = any(entry.name == "per_device_train_batch_size" for entry in fields(kinds[-1]))
    parser = _Parser(
        list(kinds),
        prog=f"fastdaa {command}",
        usage=f"fastdaa {command} --model M --dataset D [--output_dir O] [options]",
        description=what + (_TRAINER_HELP if trainer else "") + _CONFIG_HELP,
        epilog="A bare --debug shows tracebacks of errors.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of defaults.")
    resume = parser._option_string_actions["--resume_from_checkpoint"]
    resume.nargs, resume.const = "?", "true"
    resume.help = "A checkpoint, or nothing for the last complete one in output_dir."
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for action in parser._actions:
        if hints.get(action.dest) in (int | None, float | None):
            action.type = _or_none(action.type)
    return parser


def stage_config(kind: Any, values: dict[str, Any], arguments: StageArguments) -> Any:
    """The configuration of a stage on ``transformers.Trainer``; it evaluates where it can."""
    if arguments.evaluates and values["eval_strategy"] == "no":
        values["eval_strategy"] = "epoch"
    return _build(kind, values)


def load_splits(
    arguments: StageArguments, config: Any, load: Callable[..., Dataset]
) -> tuple[Dataset, Dataset | None]:
    """Data to train on, and to evaluate on if the options name any.

    Raises:
        DataError: data that cannot be used.
        ValueError: ``eval_strategy`` without data to evaluate on.
    """
    strategy: Any = config.eval_strategy
    if strategy != "no" and not arguments.evaluates:
        raise ValueError(
            f"eval_strategy: got {strategy.value!r}, but nothing to evaluate on; expected "
            "eval_dataset, eval_split or test_size as well"
        )
    train = load(
        arguments.dataset, split=arguments.dataset_split, name=arguments.dataset_name,
        limit=arguments.max_train_samples, on_bad_row=config.on_bad_row,
    )  # fmt: skip
    if arguments.test_size is not None:
        return _split(train, arguments.test_size, config)
    if not arguments.evaluates:
        return train, None
    evaluation = load(
        arguments.eval_dataset or arguments.dataset, split=arguments.eval_split,
        name=None if arguments.eval_dataset else arguments.dataset_name,
        on_bad_row=config.on_bad_row,
    )  # fmt: skip
    return train, evaluation


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
    program = ["-m", "fastdaa.cli"] if "LOCAL_RANK" in os.environ else ["fastdaa"]
    resume = [] if checkpoint is None else ["--resume_from_checkpoint"]
    return shlex.join([*program, command, *kept, *resume])


def print_continuation(command: str, argv: Sequence[str], output_dir: str, where: str) -> None:
    """Says where a run was interrupted, and the command that continues it."""
    from fastdaa.train.checkpoints import last_complete

    checkpoint = last_complete(output_dir)
    if checkpoint is None:
        print(f"\nInterrupted at {where}, before any checkpoint. To start again:")
    else:
        print(f"\nInterrupted at {where}; saved: {checkpoint}\nTo continue:")
    print(f"  {continuation(command, argv, checkpoint)}")


def run_stage(command: str, trainer: Any, checkpoint: str | None, argv: Sequence[str]) -> int:
    """Trains, saves, and prints the last numbers; 130 where a signal stopped the run."""
    from fastdaa.train.interrupt import was_interrupted

    folder = str(trainer.args.output_dir)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        interrupted = was_interrupted(trainer)
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        if trainer.is_world_process_zero():
            where = f"step {trainer.state.global_step}"
            print_continuation(command, argv, folder, where)
        return INTERRUPTED
    trainer.save_model()
    if trainer.is_world_process_zero():
        print_numbers(trainer.state.log_history, folder)
    return 0


_SHOWN = (
    ("loss", "loss"),
    ("mean_token_accuracy", "token accuracy"),
    ("entropy", "entropy (nats)"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"),
    ("rewards/center", "centre of rewards"),
)


def print_numbers(rows: Sequence[Any], folder: str) -> None:
    """Prints the last training and evaluation values of ``rows``, and where the model is."""
    from rich.console import Console
    from rich.table import Table

    from fastdaa.cli.summary import last_values

    train, evaluation = last_values(rows), last_values(rows, "eval_")
    table = Table("", "training", *(["evaluation"] if evaluation else []))
    for key, title in _SHOWN:
        values = [train.get(key)] + ([evaluation.get(key)] if evaluation else [])
        if any(value is not None for value in values):
            table.add_row(title, *("" if v is None else f"{v:,.4g}" for v in values))
    console = Console()
    console.print(table)
    console.print(f"model and tokenizer: {folder}", highlight=False, soft_wrap=True)
