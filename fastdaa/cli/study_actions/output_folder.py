"""Where the actions of the small world write."""

from __future__ import annotations

import argparse


def add_output_dir(parser: argparse.ArgumentParser) -> None:
    """``--output_dir``."""
    parser.add_argument(
        "--output_dir", default="study_output",
        help="folder of the results; default: study_output",
    )  # fmt: skip
