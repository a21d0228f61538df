"""The flags that every measuring sub-command of ``fastdaa bench`` has, in one place."""

from __future__ import annotations

import argparse
from pathlib import Path

SELECTIONS = ("quick", "cpu", "gpu", "full")
DTYPES = ("float32", "bfloat16", "float16")


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what to measure, on what, for how long, where rows go, and the comparison's flags."""
    _add_what(parser.add_argument_group("what is measured"))
    _add_how(parser.add_argument_group("how"))
    where = parser.add_argument_group("where rows go")
    where.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON lines; rows that are there already are not measured again",
    )
    where.add_argument("--fresh", action="store_true", help="move an older FILE aside first")
    _add_compared(parser.add_argument_group("two versions of this project in one run"))


def _add_what(group: argparse._ArgumentGroup) -> None:
    chosen = group.add_mutually_exclusive_group()
    chosen.add_argument("--cases", type=names, metavar="A,B", help="these cases (see --list)")
    chosen.add_argument(
        "--selection",
        choices=SELECTIONS,
        help="a named set of cases (default: quick, on CUDA gpu)",
    )
    group.add_argument("--contenders", type=names, metavar="A,B", help="these contenders only")
    group.add_argument("--losses", type=names, metavar="A,B", help="these losses only")
    group.add_argument("--list", action="store_true", help="list cases and contenders, then stop")


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device", choices=("cpu", "cuda"), help="where it runs (default: cuda where there is one)"
    )
    group.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the inputs (default: the case's own)"
    )
    group.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="torch threads on the CPU (default: torch's own)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all inputs (default: 0)"
    )
    group.add_argument(
        "--repeats",
        type=positive,
        metavar="N",
        help="timed calls of a contender, fewer where the budget ends them (default: 20, with "
        "--compare 7)",
    )
    group.add_argument(
        "--budget",
        type=seconds,
        metavar="S",
        help="seconds for the timed calls of all contenders and cases together; three calls each "
        "are made however long they take (default: 10, with cpu 40, gpu 60, full 1800)",
    )


def _add_compared(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compare",
        metavar="REF",
        help="a git commit, branch or tag, measured in turns with the working tree; or A..B",
    )
    group.add_argument(
        "--threshold",
        type=fraction,
        default=0.05,
        metavar="X",
        help="smallest slowdown that makes the exit code 1 (default: 0.05, that is 5 %%)",
    )
    group.add_argument(
        "--launches",
        type=positive,
        default=4,
        metavar="N",
        help="how often both versions are started afresh (default: 4)",
    )


def names(text: str) -> list[str]:
    """``a,b`` as a list without blanks; an empty list is an error."""
    found = [name for part in text.split(",") if (name := part.strip())]
    if not found:
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return found


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A number above zero."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def not_negative(text: str) -> float:
    """A number that is not below zero."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text!r}")
    return value


def fraction(text: str) -> float:
    """A number between 0 and 1, such as 0.05."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
