"""From a command line to dataclasses, with a YAML file of defaults below it."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import get_annotations
from pathlib import Path
from typing import Any, NoReturn, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from fastdaa.cli.yaml_defaults import apply_yaml, nearest_option
from fastdaa.validation import shown

_NONE_WORDS = ("none", "null")
_LONGEST_CHOICES = 60
_TRAINER_HELP = " Every option of transformers.TrainingArguments is here under its own name, too."
_TRAINER_TITLE = "training (transformers.TrainingArguments)"
_CONFIG_HELP = (
    " A YAML file given with --config holds defaults, under the same names, that options on the "
    "command line override."
)


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
    early = OptionParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    path = early.parse_known_args(list(argv))[0].config
    if path is not None:
        apply_yaml(parser, Path(path))
    # A misspelt option is named before argparse misses the one that was meant.
    for given in (text.split("=")[0] for text in argv if text.startswith("--")):
        if given not in parser._option_string_actions:
            raise ValueError(f"unknown option {given!r}{nearest_option(parser, given[2:], '--')}")
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
        usage=f"fastdaa {command} --model M --dataset D {shown}[--output_dir O] [options]",
        description=what + (_TRAINER_HELP if trainer else "") + _CONFIG_HELP,
        epilog="A bare --debug shows tracebacks of errors.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    if "--output_dir" not in parser._option_string_actions:
        parser.usage = f"fastdaa {command} --model M --dataset D {shown}[options]"
    parser.sections = _sections(kinds, title)
    if trainer:
        # Scripts of transformers ask for it; here, asking for something else would be an error.
        parser.set_defaults(do_train=True)
    parser.add_argument("--config", help="YAML file of defaults.")
    resume = parser._option_string_actions.get("--resume_from_checkpoint")
    if resume is not None:
        resume.nargs, resume.const = "?", "true"
        resume.help = "A checkpoint, or nothing for the last complete one in output_dir."
    if trainer:
        parser._option_string_actions[
            "--output_dir"
        ].help = "Folder of checkpoints, metrics and the model. Default: trainer_output."
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for action in parser._actions:
        hint = hints.get(action.dest)
        if hint in (int | None, float | None):
            action.type = _or_none(action.type)
        elif dict in (action.type, get_origin(action.type)):
            action.type = _object
        elif hint in (str | bool, bool | str):
            action.type = _word_or_bool
    return parser


def build(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass from the values that it has fields for."""
    return kind(**{entry.name: values[entry.name] for entry in fields(kind) if entry.init})


class OptionParser(HfArgumentParser):
    """Raises instead of printing a usage text of two hundred options.

    Attributes:
        sections: titles and names of options, in the order of ``--help``; the others come first.
    """

    sections: Sequence[tuple[str, list[str]]] = ()

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def format_help(self) -> str:
        """The text of ``--help``."""
        titled = [name for _, names in self.sections for name in names]
        general = [action.dest for action in self._actions if action.dest not in titled]
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, names in [("options", general), *self.sections]:
            formatter.start_section(title)
            places = {name: place for place, name in enumerate(names)}
            shown = [action for action in self._actions if action.dest in places]
            formatter.add_arguments(sorted(shown, key=lambda action: places[action.dest]))
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


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


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of an option, and only defaults that say something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        spelled = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        shown.option_strings = spelled or action.option_strings
        return super()._format_action_invocation(shown)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if not _has_long_choices(action):
            return super()._metavar_formatter(action, default_metavar)
        return lambda size: (action.dest.upper(),) * size

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action, argparse._StoreFalseAction):
            return f"Turn --{action.dest} off."
        if action.default in (None, "", [], {}):
            return action.help
        return super()._get_help_string(action)

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            text = super()._expand_help(action)
        except (ValueError, TypeError):
            # Some releases of transformers have a bare % in a help text.
            text = action.help or ""
        if _has_long_choices(action):
            text = f"{text.rstrip()} One of: {', '.join(map(str, action.choices or ()))}."
        return text


def _has_long_choices(action: argparse.Action) -> bool:
    """Whether its choices would make a line that no terminal has room for."""
    return len(",".join(map(str, action.choices or ()))) > _LONGEST_CHOICES


def _or_none(convert: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() in _NONE_WORDS else convert(text)

    # argparse names the type in its message.
    read.__name__ = convert.__name__
    return read


def _object(text: str) -> dict[str, Any]:
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
