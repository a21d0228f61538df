"""``fastdaa study sweep``: losses x betas x seeds x sizes in the small world.

Each run goes through the library's own trainer and is measured exactly at its checkpoints. Finished
runs are kept; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdaa.cli.runs import INTERRUPTED
from fastdaa.cli.study_actions.output_folder import add_output_dir
from fastdaa.counted import counted

if TYPE_CHECKING:
    from rich.console import Console

    from fastdaa.study.kept_runs import SweepResult

HELP = "train over losses, betas, seeds and sizes in the small world"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the action."""
    add_output_dir(parser)
    parser.add_argument(
        "--presets", nargs="+", default=["H"], help="worlds: H (harsh), M (mild); default: H"
    )
    parser.add_argument(
        "--losses", nargs="+", default=["dpo", "ipo", "slic"],
        help="some of dpo, ipo, slic and rdpo (length-regularised DPO); default: dpo ipo slic",
    )  # fmt: skip
    parser.add_argument(
        "--betas", nargs="+", type=float, help="betas; default: 0.005 0.02 0.05 0.1 0.2 0.5 1 2"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="seeds of worlds and runs; default: 0"
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["d32"], help="model sizes: d12, d32, d64; default: d32"
    )
    parser.add_argument("--length_alpha", type=float, help="length penalty of rdpo; default: 0.1")
    parser.add_argument(
        "--checkpoints", type=int, default=5, help="evaluations of a run; default: 5"
    )
    add_workers(parser)
    parser.add_argument("--dry_run", action="store_true", help="list the runs, and do none")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The option of everything that runs in several processes."""
    parser.add_argument(
        "--workers", type=int,
        help="processes of one thread each; default: one a core, at most 16",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """0; 1 if a run failed; 130 after Ctrl-C."""
    from rich.console import Console

    from fastdaa.study.kept_runs import POINTS
    from fastdaa.study.plan import BETAS, LENGTH_ALPHA, grid
    from fastdaa.study.pool import worker_count
    from fastdaa.study.sweep import sweep

    worker_count(options.workers)
    runs = grid(
        options.presets,
        options.losses,
        BETAS if options.betas is None else options.betas,
        options.seeds,
        options.sizes,
        LENGTH_ALPHA if options.length_alpha is None else options.length_alpha,
        checkpoints=options.checkpoints,
    )
    if options.dry_run:
        print("\n".join(run.id for run in runs))
        return 0
    console = Console()
    try:
        result = sweep(runs, options.output_dir, workers=options.workers, console=console)
    except KeyboardInterrupt:
        say_how_to_continue(options.output_dir)
        return INTERRUPTED
    said = f"{counted(result.finished, 'run')} in {result.seconds:.0f} s"
    say_what_was_done(console, said, result, Path(options.output_dir) / POINTS)
    return report_failures(result.failed)


def say_what_was_done(console: Console, said: str, result: SweepResult, points: Path) -> None:
    """One line, with the table where there is one."""
    kept = f", {result.kept} done before" if result.kept else ""
    where = f": {points}" if points.is_file() else ""
    console.print(f"{said}{kept}{where}", highlight=False, soft_wrap=True)


def failures(record: dict[str, Any]) -> dict[str, str]:
    """The errors of ``study.json``, by run or step."""
    failed: dict[str, str] = {}
    for step, errors in record["failed"].items():
        failed |= errors if isinstance(errors, dict) else {f"step {step}": errors}
    return failed


def report_failures(failed: dict[str, str]) -> int:
    """Lists what failed on stderr; the exit code: 1 if there is any, else 0."""
    for name, error in failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} failed; the same command tries again", file=sys.stderr)
    return 1 if failed else 0


def say_how_to_continue(output_dir: str) -> None:
    """What was kept after Ctrl-C, and the command that goes on."""
    command = shlex.join(["fastdaa", *sys.argv[1:]])
    print(f"\nInterrupted. Finished runs are kept in {output_dir}. To continue:\n  {command}")
