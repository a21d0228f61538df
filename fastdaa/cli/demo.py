"""``fastdaa demo``: a small policy from scratch, fine-tuned and aligned on the CPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    """Runs the demo; 0, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="fastdaa demo", description=__doc__.split(": ", 1)[1], allow_abbrev=False
    )
    parser.add_argument("--output_dir", default="demo_output", help="default: demo_output")
    parser.add_argument(
        "--losses", nargs="+", default=["dpo", "ipo", "slic"], help="default: dpo ipo slic"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and sampling")
    parser.add_argument("--fast", action="store_true", help="a glimpse whose numbers mean nothing")
    options = parser.parse_args(list(argv))
    from fastdaa.demo.run import main

    main(options.output_dir, losses=options.losses, seed=options.seed, fast=options.fast)
    return 0
