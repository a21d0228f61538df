"""``fastdaa study``: one action a module of ``study_actions``, found by its name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

from fastdaa.cli.plain_parser import PlainParser

ACTIONS = (
    "full",
    "world",
    "estimators",
    "sweep",
    "fit",
    "tree",
    "correlate",
    "report",
    "track",
    "online",
)
"""In the order that help lists them. An action's module has ``HELP`` (one line),
``add_arguments(parser)`` and ``run(options) -> int``, and imports what is slow in functions."""

_DESCRIPTION = """\
Controlled experiments on over-optimisation: how quality moves with the distance from the reference,
in a small language whose reward is known exactly, and in tables of your own runs."""


def run(argv: Sequence[str]) -> int:
    """Runs the action that ``argv`` names and returns its exit code."""
    if not argv or argv[0] == "help":
        build_parser().print_help()
        return 0 if argv else 2
    if not argv[0].startswith("-") and argv[0] not in ACTIONS:
        near = difflib.get_close_matches(argv[0], ACTIONS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else f"; one of {', '.join(ACTIONS)}"
        raise ValueError(f"expected an action, got {argv[0]!r}{hint}")
    options = build_parser().parse_args(list(argv))
    return int(options.action(options))


def build_parser() -> PlainParser:
    """The parser of all actions whose module exists."""
    parser = PlainParser(
        prog="fastdaa study", usage="fastdaa study ACTION [options]", description=_DESCRIPTION,
        epilog="`fastdaa study ACTION --help` shows an action's options.",
    )  # fmt: skip
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, module in available().items():
        description = module.__doc__.split(": ", 1)[-1] if module.__doc__ else module.HELP
        action = actions.add_parser(
            name,
            prog=f"fastdaa study {name}",
            help=module.HELP,
            description=description[0].upper() + description[1:],
        )
        module.add_arguments(action)
        action.set_defaults(action=module.run)
    return parser


def available() -> dict[str, ModuleType]:
    """The actions whose module exists."""
    package = "fastdaa.cli.study_actions"
    names = [n for n in ACTIONS if importlib.util.find_spec(f"{package}.{n}") is not None]
    return {name: importlib.import_module(f"{package}.{name}") for name in names}
