"""``fastdaa demo``: a small sweep that over-optimises a known reward, with its law and its page.

DPO, IPO and SLiC at eight betas each; a minute and a half on two free cores. What is finished is
kept; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_INTERRUPTED = 130


def run(argv: Sequence[str]) -> int:
    """Runs the demo; 0, 1 if something failed, 130 after Ctrl-C."""
    from fastdaa.cli.study_actions import sweep

    parser = argparse.ArgumentParser(
        prog="fastdaa demo",
        description=__doc__.split(": ", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", default="demo_output", help="default: demo_output")
    parser.add_argument(
        "--losses", nargs="+", default=["dpo", "ipo", "slic"], help="default: dpo ipo slic"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="each is as much work; default: 0"
    )
    sweep.add_workers(parser)
    parser.add_argument("--fast", action="store_true", help="a glimpse whose numbers mean nothing")
    options = parser.parse_args(list(argv))
    from fastdaa.demo.run import main

    try:
        record = main(
            options.output_dir, losses=options.losses, seeds=options.seeds, fast=options.fast,
            workers=options.workers,
        )  # fmt: skip
    except KeyboardInterrupt:
        sweep.say_how_to_continue(options.output_dir)
        return _INTERRUPTED
    return sweep.report_failures(sweep.failures(record))
