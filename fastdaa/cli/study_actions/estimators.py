"""``fastdaa study estimators``: estimates of the KL from samples, against the exact value.

Takes policies at three distances from the reference (a short DPO run), or from folders, samples
from each 200 times 256 responses, and compares k1, the Rao-Blackwellised estimate, k3 and trlX's
form with enumeration (estimators.json).
"""

from __future__ import annotations

import argparse

from fastdaa.cli.runs import INTERRUPTED
from fastdaa.cli.study_actions.output_folder import add_output_dir

HELP = "KL estimators from samples against exact enumeration (estimators.json)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the action."""
    add_output_dir(parser)
    parser.add_argument("--preset", default="H", help="world: H (harsh) or M (mild); default: H")
    parser.add_argument("--seed", type=int, default=0, help="seed of world and samples; default: 0")
    parser.add_argument("--size", default="d32", help="model size: d12, d32 or d64; default: d32")
    parser.add_argument(
        "--policies", nargs="+", default=[], metavar="FOLDER",
        help="saved policies of that world; default: those of a short DPO run",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=256, help="samples per repeat; default: 256")
    parser.add_argument(
        "--repeats", type=int, default=200, help="repeats of each estimate; default: 200"
    )


def run(options: argparse.Namespace) -> int:
    """0; 130 after Ctrl-C."""
    import torch
    from rich.console import Console

    from fastdaa.study.estimators import ESTIMATORS_FILE, run_estimators

    # Matrices this small are slower with more threads.
    torch.set_num_threads(1)
    console = Console()
    try:
        with console.status("training and sampling"):
            run_estimators(
                options.output_dir,
                options.seed,
                lambda text: console.print(text, highlight=False, soft_wrap=True),
                preset=options.preset,
                size=options.size,
                policy_folders=options.policies,
                samples=options.samples,
                repeats=options.repeats,
            )
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing was written; the same command starts again.")
        return INTERRUPTED
    console.print(f"{options.output_dir}/{ESTIMATORS_FILE}", highlight=False, soft_wrap=True)
    return 0
