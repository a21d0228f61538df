"""The parser of commands whose options are few: its errors are one line, like everyone's."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fastdaa.cli.help_format import HelpFormatter


class PlainParser(argparse.ArgumentParser):
    """Raises ``ValueError`` where ``argparse`` would print the usage of all options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Leaves a mistake to the command line's one line."""
        raise ValueError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what is unknown here, where the options are known that may have been meant."""
        if self._subparsers is None:
            self._check_options(sys.argv[1:] if args is None else args)
        read, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return read, unknown

    def _check_options(self, args: Sequence[str]) -> None:
        """A misspelt option is named before argparse misses the one that was meant."""
        for given in (text.split("=")[0] for text in args if text.startswith("--")):
            if given not in self._option_string_actions and given != "--":
                near = difflib.get_close_matches(given, self._option_string_actions, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                every = f"; `{self.prog} --help` lists all options"
                self.error(f"unknown option {given!r}{hint or every}")
