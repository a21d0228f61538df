"""The options of ``fastdaa train``: three dataclasses, a YAML file below the command line."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

from transformers import HfArgumentParser

from fastdaa.cli.track_arguments import TrackArguments
from fastdaa.cli.yaml_defaults import apply_yaml, nearest_option
from fastdaa.train.config import PreferenceConfig

_NONE_WORDS = ("none", "null")
_DESCRIPTION = """\
Trains a policy on preference pairs. MODEL and DATASET are local paths or hub ids. Every option of
transformers.TrainingArguments is here under its own name, too. A YAML file given with --config
holds defaults, under the same names, that options on the command line override."""


@dataclass
class TrainArguments:
    """What ``fastdaa train`` builds before it calls the trainer."""

    _argument_group_name = "model and data"

    model: str = field(metadata={"help": "Policy to train: a local folder or a hub id."})
    dataset: str = field(
        metadata={
            "help": "Preference pairs: a .jsonl, .json, .csv or .parquet file, a folder of "
            "such files, a saved dataset, or a hub id."
        }
    )
    ref_model: str | None = field(
        default=None, metadata={"help": "Reference. Default: the policy as it is at the start."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset."}
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split to train on. Default: the only one, or train."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Pairs to evaluate on. Default: none."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of eval_dataset, or else of dataset."}
    )
    test_size: float | None = field(
        default=None,
        metadata={"help": "Evaluate on that share (below 1) or number of the training pairs."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first so many pairs."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "dtype of the weights; auto: as they are stored."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a model on the hub."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the model; matters in layout padded only."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Chat template: a Jinja file, or the template itself."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "The update is scaled by alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout of adapters; needs --disable_dropout false."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules with adapters. Default: all linear ones but the head."},
    )
    # Options of their own, read beside these.
    track: TrackArguments = field(init=False, default_factory=TrackArguments)

    def __post_init__(self) -> None:
        if self.test_size is not None:
            if self.eval_dataset or self.eval_split:
                raise ValueError(
                    "test_size: expected none beside eval_dataset or eval_split, got "
                    f"{self.test_size}; evaluation pairs come from one place"
                )
            whole = self.test_size >= 1 and self.test_size == int(self.test_size)
            if not whole and not 0 < self.test_size < 1:
                raise ValueError(
                    "test_size: expected a share between 0 and 1 or a number of pairs, got "
                    f"{self.test_size}"
                )
        for name in ("lora_r", "max_train_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected an integer above 0, got {value}")

    @property
    def evaluates(self) -> bool:
        """Whether there are pairs to evaluate on."""
        return bool(self.eval_dataset or self.eval_split or self.test_size)


def parse(argv: Sequence[str]) -> tuple[TrainArguments, PreferenceConfig]:
    """Reads a command line of ``fastdaa train``.

    Raises:
        ValueError: an unknown option or key, with the nearest valid one, or a bad value.
        OSError: the YAML file cannot be read.
    """
    parser = build_parser()
    early = _Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    path = early.parse_known_args(list(argv))[0].config
    if path is not None:
        apply_yaml(parser, Path(path))
    # A misspelt option is named before argparse misses the one that was meant.
    for given in (text.split("=")[0] for text in argv if text.startswith("--")):
        if given not in parser._option_string_actions:
            near = nearest_option(parser, given[2:], "--")
            raise ValueError(f"unknown option {given!r}{near}")
    namespace, rest = parser.parse_known_args(list(argv))
    if rest:
        raise ValueError(f"expected options such as --model, got {rest[0]!r}")
    values = vars(namespace)
    arguments = _build(TrainArguments, values)
    arguments.track = _build(TrackArguments, values)
    if arguments.evaluates and values["eval_strategy"] == "no":
        values["eval_strategy"] = "epoch"
    return arguments, _build(PreferenceConfig, values)


def build_parser() -> HfArgumentParser:
    """The parser of all options."""
    kinds: list[Any] = [TrainArguments, TrackArguments, PreferenceConfig]
    parser = _Parser(
        kinds,
        prog="fastdaa train",
        usage="fastdaa train --model M --dataset D [--loss dpo] [--output_dir O] [options]",
        description=_DESCRIPTION,
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


class _Parser(HfArgumentParser):
    """Raises instead of printing a usage text of two hundred options."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of an option, and only defaults that say something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        spelled = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        shown.option_strings = spelled or action.option_strings
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", [], {}):
            return action.help
        return super()._get_help_string(action)

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError):
            # Some releases of transformers have a bare % in a help text.
            return action.help or ""


def _or_none(convert: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() in _NONE_WORDS else convert(text)

    # argparse names the type in its message.
    read.__name__ = convert.__name__
    return read


def _build(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{entry.name: values[entry.name] for entry in fields(kind) if entry.init})
