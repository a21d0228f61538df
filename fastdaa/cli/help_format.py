"""How options look in help: short metavars, one spelling of each, defaults in words."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import Any

_LONGEST_CHOICES = 60
_OF_TYPES = {
    "int": "N",
    "float": "X",
    "string_to_bool": "BOOL",
    "json_object": "JSON",
}
_OF_LAST_WORDS = {
    **dict.fromkeys(("kwargs", "config", "options"), "JSON"),
    **dict.fromkeys(("to", "type"), "NAME"),
}


class HelpFormatter(argparse.HelpFormatter):
    """Fills every paragraph by itself, and keeps metavars and spellings short.

    What an option takes is named after its type (``N``, ``X``, ``BOOL``, ``JSON``), or by the last
    word of its name: ``--output_dir DIR``.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [super(HelpFormatter, self)._fill_text(part, width, indent)
                      for part in re.split(r"\n\s*\n", text.strip())]  # fmt: skip
        return "\n\n".join(paragraphs)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        last = action.dest.split("_")[-1]
        known = _OF_TYPES.get(getattr(action.type, "__name__", ""))
        return known or _OF_LAST_WORDS.get(last) or last.upper()

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if action.metavar is None and has_long_choices(action):
            return lambda size: ("NAME",) * size
        return super()._metavar_formatter(action, default_metavar)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        text = super()._format_args(action, default_metavar)
        # DATASET ... in place of DATASET [DATASET ...].
        return re.sub(r"^(\S+) \[\1 \.\.\.\]$", r"\1 ...", text)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        # With underscores; the same name with dashes is accepted, too.
        spelled = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        names = ", ".join(spelled or action.option_strings)
        if action.nargs == 0:
            return names
        return (
            f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )


class OptionFormatter(HelpFormatter):
    """Ends each text with the default, unless the text tells it or there is nothing to tell."""

    long_choices = True
    """Whether choices that no line has room for are listed in the text."""

    def _expand_help(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._StoreFalseAction):
            return f"Turn --{action.dest} off."
        try:
            text = super()._expand_help(action).rstrip()
        except (ValueError, TypeError):
            # Some releases of transformers have a bare % in a help text.
            text = (action.help or "").rstrip()
        if self.long_choices and has_long_choices(action):
            text += f" One of: {', '.join(map(str, action.choices or ()))}."
        default = shown_default(action.default)
        if default and not re.search(r"\bdefault", text, re.IGNORECASE):
            text += f" Default: {default}."
        return text


class CommonFormatter(OptionFormatter):
    """For a page of few options: their first sentences, most beside the name, and no long lists."""

    long_choices = False

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=34, **options)

    def _expand_help(self, action: argparse.Action) -> str:
        first, *more = re.split(r"(?<=\.) (?=[A-Z])", super()._expand_help(action))
        if action.default is False:
            # That a switch is off without being asked for goes without saying here.
            return first
        return " ".join([first, *(text for text in more if text.startswith("Default"))])


def has_long_choices(action: argparse.Action) -> bool:
    """Whether its choices would make a line that no terminal has room for."""
    return len(",".join(map(str, action.choices or ()))) > _LONGEST_CHOICES


def shown_default(default: Any) -> str:
    """A default as it would be typed; nothing where there is none."""
    if default in (None, "", [], {}, argparse.SUPPRESS):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return " ".join(map(str, default))
    # 1e-6 in place of 1e-06.
    return f"{default:g}".replace("e-0", "e-") if isinstance(default, float) else str(default)


def fill_usage(usage: str, width: int) -> str:
    """Breaks a usage line that is too long between options, never before an option's value."""
    bound = re.sub(r"(--\w+) (?=\w)", "\\1\N{NO-BREAK SPACE}", usage)
    indent = " " * len("usage: fastdaa ")
    lines = textwrap.wrap(
        bound, width - len("usage: "), break_on_hyphens=False, break_long_words=False
    )
    return f"\n{indent}".join(lines).replace("\N{NO-BREAK SPACE}", " ")
