"""From a command line to dataclasses, with a YAML file of defaults below it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from inspect import get_annotations
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from fastdaa.cli.common_options import COMMON, EXAMPLES, plain_words
from fastdaa.cli.help_format import CommonFormatter, OptionFormatter, fill_usage
from fastdaa.cli.other_names import own_names
from fastdaa.cli.yaml_defaults import apply_yaml, nearest_option, one_of
from fastdaa.validation import shown

_NONE_WORDS = ("none", "null")
_GENERAL = ("help", "help_all", "config")
_TRAINER_HELP = " Every option of transformers.TrainingArguments is accepted under its own name."
_TRAINER_TITLE = "training (transformers.TrainingArguments)"
_CONFIG_HELP = "YAML file of defaults under the same names; the command line overrides it."


def read_options(
    parser: OptionParser, kinds: Sequence[Any], argv: Sequence[str]
) -> tuple[list[Any], dict[str, Any]]:
    """Reads a command line into dataclasses.

    Args:
        parser: see :func:`option_parser`.
        kinds: its dataclasses; the first holds what is built, the last the configuration.
        argv: behind the command.

    Returns:
        One object a dataclass, but for the last, and all values, for that.

    Raises:
        ValueError: an unknown option or key, with the nearest valid one, or a bad value.
        OSError: the YAML file cannot be read.
    """
    options = parser._option_string_actions
    argv = own_names(argv, options)
    early = OptionParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    path = early.parse_known_args(list(argv))[0].config
    if path is not None:
        apply_yaml(parser, Path(path))
    # A misspelt option is named before argparse misses the one that was meant.
    given = (text.split("=")[0] for text in argv if text.startswith("--"))
    near = {text: nearest_option(parser, text[2:], "--") for text in given if text not in options}
    if near:
        listed = ", ".join(f"{text!r}{hint}" for text, hint in near.items())
        every = "" if all(near.values()) else f"; `{parser.prog} --help-all` lists all options"
        raise ValueError(f"unknown option{'s' * (len(near) > 1)} {listed}{every}")
    namespace, rest = parser.parse_known_args(list(argv))
    if rest:
        raise ValueError(f"expected options such as --model, got {shown(rest[0])}")
    values = vars(namespace)
    return [build(kind, values) for kind in kinds[:-1]], values


def option_parser(
    command: str, kinds: Sequence[Any], what: str, *, title: str, shown: str = ""
) -> OptionParser:
    """The parser of all options of a command.

    Args:
        command: the sub-command.
        kinds: dataclasses, whose fields are the options.
        what: what it does, for ``--help``.
        title: of the last one's own options there.
        shown: an option of its own that the usage line names.
    """
    trainer = issubclass(kinds[-1], TrainingArguments)
    parser = OptionParser(
        list(kinds),
        prog=f"fastdaa {command}",
        usage=f"fastdaa {command} --model M --dataset D {shown}[--output_dir DIR] [options]",
        description=what + (_TRAINER_HELP if trainer else ""),
        formatter_class=OptionFormatter,
        allow_abbrev=False,
    )
    if "--output_dir" not in parser._option_string_actions:
        parser.usage = f"fastdaa {command} --model M --dataset D {shown}[options]"
    parser.sections = _sections(kinds, title)
    parser.common = COMMON.get(command, {})
    parser.examples = EXAMPLES.get(command, {})
    if trainer:
        # Scripts of transformers ask for it; here, asking for something else would be an error.
        parser.set_defaults(do_train=True)
        # So that a `no` that was given is known from none: see `trainer_config`.
        parser.set_defaults(eval_strategy=None)
    if parser.common:
        parser._option_string_actions["--help"].help = "show the common options, and exit"
    for option, text in (
        ("--help-all", f"show all {parser.count + 1} options, and exit"),
        ("--help_all", argparse.SUPPRESS),
    ):
        parser.add_argument(
            option, action=_HelpAll, nargs=0, dest="help_all", default=argparse.SUPPRESS, help=text
        )
    parser.add_argument("--config", metavar="FILE", help=_CONFIG_HELP)
    resume = parser._option_string_actions.get("--resume_from_checkpoint")
    if resume is not None:
        resume.nargs, resume.const = "?", "true"
        resume.help = "Continue from the last complete checkpoint in output_dir, or from this one."
    if trainer:
        parser._option_string_actions[
            "--output_dir"
        ].help = "Folder of checkpoints, metrics and the model. Default: trainer_output."
        parser._option_string_actions["--report_to"].nargs = "+"
    for action in parser._actions:
        action.help = plain_words(action.dest, action.help)
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for action in parser._actions:
        hint = hints.get(action.dest)
        if hint in (int | None, float | None):
            action.type = _or_none(action.type)
        elif dict in (action.type, get_origin(action.type)):
            action.type = json_object
        elif hint in (str | bool, bool | str) or (action.const is True and action.type is str):
            action.type = _word_or_bool
        elif hint == bool | None and action.nargs is None:
            # As every other switch.
            action.nargs, action.const = "?", True
    return parser


def build(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass from the values that it has fields for."""
    return kind(**{entry.name: values[entry.name] for entry in fields(kind) if entry.init})


class OptionParser(HfArgumentParser):
    """Raises instead of printing a usage text of two hundred options.

    Attributes:
        sections: titles and names of all options, in the order of ``--help-all``.
        common: the same of those that ``--help`` shows; nothing: all.
        examples: what a command line does, and the line itself.
    """

    sections: Sequence[tuple[str, Sequence[str]]] = ()
    common: Mapping[str, Sequence[str]] = MappingProxyType({})
    examples: Mapping[str, str] = MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        # One of the spellings that argparse lists: --max_steps/--max-steps.
        raise ValueError(re.sub(r"^(argument --\w+)/[^:]*", r"\1", message))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # argparse would list every choice, of which --optim has some forty.
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                action, f"expected {one_of(action.choices, value)}, got {value!r}"
            )

    def format_help(self) -> str:
        """The text of ``--help``: the common options, examples, and where the others are."""
        if not self.common:
            return self.format_help_all()
        shown = 1 + sum(map(len, self.common.values()))
        more = f"These are {shown} of {self.count} options; `{self.prog} --help-all` lists all.\n"
        formatter = CommonFormatter(prog=self.prog)
        return self._page(formatter, [*self.common.items()]) + self._ending() + more

    def format_help_all(self) -> str:
        """The text of ``--help-all``."""
        return self._page(self._get_formatter(), self.sections) + self._ending()

    @property
    def count(self) -> int:
        """The number of options, without those that show help."""
        return len({action.dest for action in self._actions} - {"help", "help_all"})

    def _page(self, formatter: Any, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
        formatter.add_usage(
            fill_usage(self.usage or "", formatter._width), self._actions,
            self._mutually_exclusive_groups,
        )  # fmt: skip
        formatter.add_text(self.description)
        for title, names in [("options", _GENERAL), *sections]:
            formatter.start_section(title)
            places = {name: place for place, name in enumerate(names)}
            shown = [action for action in self._actions if action.dest in places]
            formatter.add_arguments(sorted(shown, key=lambda action: places[action.dest]))
            formatter.end_section()
        return str(formatter.format_help())

    def _ending(self) -> str:
        lines = [f"  # {what}\n  {line}\n" for what, line in self.examples.items()]
        shown = "\nexamples:\n" + "".join(lines) if lines else ""
        return f"{shown}\nA bare --debug shows tracebacks of errors.\n"


class _HelpAll(argparse.Action):
    """``--help-all``: prints every option and exits."""

    def __call__(self, parser: Any, *_: Any) -> None:
        # As argparse prints: a reader that has seen enough (`| head`) is no error.
        parser._print_message(parser.format_help_all(), sys.stdout)
        parser.exit()


def _sections(kinds: Sequence[Any], title: str) -> list[tuple[str, list[str]]]:
    """What is built, how it is trained, everything between, and last the Trainer's options."""
    *others, config = [[entry.name for entry in fields(kind) if entry.init] for kind in kinds]
    known = [entry.name for entry in fields(TrainingArguments)]
    trainer = known if issubclass(kinds[-1], TrainingArguments) else []
    titles = [kind._argument_group_name for kind in kinds[:-1]]
    first, *between = zip(titles, others, strict=True)
    declared = get_annotations(kinds[-1])
    own = [name for name in config if name not in trainer]
    # What it shares with other commands comes behind what it is about.
    own.sort(key=lambda name: name not in declared)
    return [first, (title, own), *between, *([(_TRAINER_TITLE, trainer)] if trainer else [])]


def _or_none(convert: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() in _NONE_WORDS else convert(text)

    # argparse names the type in its message.
    read.__name__ = convert.__name__
    return read


def json_object(text: str) -> dict[str, Any]:
    """An option of mappings, which `dict` itself cannot read."""
    try:
        read = json.loads(text)
    except json.JSONDecodeError as error:
        message = f"expected a JSON object, got {shown(text)} ({error})"
        raise argparse.ArgumentTypeError(message) from error
    if not isinstance(read, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {shown(text)}")
    return read


def _word_or_bool(text: str) -> str | bool:
    """An option that is a switch and has words, too."""
    known = {"true": True, "yes": True, "false": False}
    return known.get(text.lower(), text)
