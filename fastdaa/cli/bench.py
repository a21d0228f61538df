"""``fastdaa bench``: time, memory and error of fastdaa beside other implementations."""

from __future__ import annotations

import argparse
import difflib
import importlib
import shlex
from collections.abc import Sequence

from fastdaa.cli.plain_parser import PlainParser

MEASURING = {
    "head": "log-probabilities of the output head, forward and backward",
    "loss": "the whole preference loss over the head, forward and backward",
    "step": "the whole training step beside TRL's trainer",
    "memory": "peak memory above inputs and gradients",
    "accuracy": "errors against float64, and whether two runs agree",
}
_REPORT = "pictures and one page from the rows of earlier runs"


def run(argv: Sequence[str]) -> int:
    """Runs one sub-command; its exit code is 1 if a result of fastdaa is wrong or failed."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        _overview().print_help()
        return 0 if argv else 2
    kind, *rest = argv
    if kind == "report":
        return _report(rest)
    if kind not in MEASURING:
        near = difflib.get_close_matches(kind, [*MEASURING, "report"], n=1)
        hint = (
            f" (did you mean {near[0]!r}?)" if near else f"; one of {', '.join(MEASURING)}, report"
        )
        raise ValueError(f"expected a benchmark, got {kind!r}{hint}")
    return _measure(kind, rest)


def _measure(kind: str, argv: Sequence[str]) -> int:
    from fastdaa.benchmarks.flags import add_shared_arguments

    module = importlib.import_module(f"fastdaa.benchmarks.{kind}")
    # A benchmark that needs its own kind of a shared flag defines it again.
    parser = _parser(f"fastdaa bench {kind}", MEASURING[kind])
    add_shared_arguments(parser)
    module.add_arguments(parser)
    options = parser.parse_args(list(argv))
    _check_beside(parser, options)
    options.command = shlex.join(["fastdaa", "bench", kind, *argv])
    _resolve(options)
    if options.compare is None:
        return int(module.run(options))
    from fastdaa.benchmarks.compare.turns import run as compare

    return compare(kind, options)


def _report(argv: Sequence[str]) -> int:
    from fastdaa.benchmarks import report

    parser = _parser("fastdaa bench report", _REPORT)
    report.add_arguments(parser)
    return report.run(parser.parse_args(list(argv)))


def _check_beside(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse flags that say how to do what was not asked for."""
    for flag, beside in (
        ("threshold", "compare"),
        ("launches", "compare"),
        ("fresh", "output"),
    ):
        if getattr(options, beside) is None and getattr(options, flag) != parser.get_default(flag):
            raise ValueError(f"--{flag}: expected --{beside} beside it")


def _resolve(options: argparse.Namespace) -> None:
    """Fills in the device and the threads that were left to the machine."""
    import torch

    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"expected a CUDA device, torch {torch.__version__} sees none")
    if options.threads is None:
        options.threads = torch.get_num_threads()


def _parser(prog: str, text: str) -> PlainParser:
    description = text[0].upper() + text[1:]
    return PlainParser(prog=prog, description=description, conflict_handler="resolve")


def _overview() -> argparse.ArgumentParser:
    """Lists the sub-commands and the flags that all measuring ones share."""
    from fastdaa.benchmarks.flags import add_shared_arguments

    actions = {**MEASURING, "report": _REPORT}
    lines = [f"  {name:<9} {text}" for name, text in actions.items()]
    parser = argparse.ArgumentParser(
        prog="fastdaa bench",
        usage="fastdaa bench COMMAND [options]",
        description="\n".join(["commands:", *lines]),
        epilog="`fastdaa bench COMMAND --help` adds a command's own options.\n"
        "`fastdaa bench report FILE... --output DIR` needs nothing but rows.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shared_arguments(parser)
    return parser
