"""``fastdaa study full``: the whole study, all steps one after another, and its page.

About a quarter of an hour on two free cores. What is finished is kept; the same command goes on
where it stopped.
"""

from __future__ import annotations

import argparse

from fastdaa.cli.runs import INTERRUPTED
from fastdaa.cli.study_actions.output_folder import add_output_dir
from fastdaa.cli.study_actions.sweep import (
    add_workers,
    failures,
    report_failures,
    say_how_to_continue,
)

HELP = "the whole study and its page, resumable (a quarter of an hour on two cores)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the action."""
    add_output_dir(parser)
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2],
        help="seeds of worlds and runs; sizes and R-DPO use the first two; default: 0 1 2",
    )  # fmt: skip
    add_workers(parser)


def run(options: argparse.Namespace) -> int:
    """0; 1 if a step or run failed; 130 after Ctrl-C."""
    from rich.console import Console

    from fastdaa.study.full import run_full

    console = Console()
    try:
        record = run_full(
            options.output_dir, seeds=options.seeds, workers=options.workers, console=console
        )
    except KeyboardInterrupt:
        say_how_to_continue(options.output_dir)
        return INTERRUPTED
    console.print(
        f"everything took {record['seconds']:.0f} s: {options.output_dir}/index.html",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return report_failures(failures(record))
