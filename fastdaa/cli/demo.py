"""``fastdaa demo``: A small sweep that over-optimises a known reward, with its law and its page.

DPO, IPO and SLiC at eight betas each; a minute and a half on two free cores. What is finished is
kept; the same command goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastdaa.cli.plain_parser import PlainParser
from fastdaa.cli.runs import INTERRUPTED


def run(argv: Sequence[str]) -> int:
    """Runs the demo; 0, 1 if something failed, 130 after Ctrl-C."""
    from fastdaa.cli.study_actions import sweep

    parser = PlainParser(prog="fastdaa demo", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "--output_dir", default="demo_output",
        help="folder of the page, figures and finished runs; default: demo_output",
    )  # fmt: skip
    parser.add_argument(
        "--losses", nargs="+", default=["dpo", "ipo", "slic"],
        help="losses to sweep; default: dpo ipo slic",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0],
        help="seeds of worlds and runs, each as much work as the first; default: 0",
    )  # fmt: skip
    sweep.add_workers(parser)
    parser.add_argument(
        "--fast", action="store_true", help="a quick look, whose numbers mean nothing"
    )
    options = parser.parse_args(list(argv))
    from fastdaa.demo.run import main

    try:
        record = main(
            options.output_dir, losses=options.losses, seeds=options.seeds, fast=options.fast,
            workers=options.workers,
        )  # fmt: skip
    except KeyboardInterrupt:
        sweep.say_how_to_continue(options.output_dir)
        return INTERRUPTED
    return sweep.report_failures(sweep.failures(record))
