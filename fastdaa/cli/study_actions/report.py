"""``fastdaa study report``: a page and figures from a study's folder, or from your own table.

The page is one file that needs nothing else: figures with one sentence each, the papers' claims
beside what was measured, and what was not run.
"""

from __future__ import annotations

import argparse
import shlex
import sys

HELP = "write the page and the figures of a study, or of a table of your own runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the action."""
    parser.add_argument(
        "sources", nargs="+", metavar="FOLDER",
        help="a study's folder; or tables: .jsonl or .csv files with run, checkpoint, kl and "
        "score, or output folders of tracked runs or of `fastdaa online`",
    )  # fmt: skip
    parser.add_argument(
        "--output", "--output_dir", dest="output",
        help="where index.html and figures/ go; default: FOLDER, <table>_report beside the first "
        "table, or report in an output folder",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """0; errors are raised before anything is written."""
    from rich.console import Console

    from fastdaa.study.report import build_report

    console = Console()
    command = shlex.join(["fastdaa", *sys.argv[1:]])
    path = build_report(options.sources, options.output, command=command, console=console)
    console.print(str(path), highlight=False, soft_wrap=True)
    return 0
