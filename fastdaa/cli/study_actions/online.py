"""``fastdaa study online``: APA, PPO and AWR on a learned reward, in the small world.

Each run is the library's own on-policy loop with a reward model as its reward, and is measured
exactly on the way. Finished runs are kept; the same command goes on where it stopped. Writes
points.jsonl and online.png, and says what the runs show.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdaa.cli.runs import INTERRUPTED
from fastdaa.cli.study_actions.output_folder import add_output_dir
from fastdaa.cli.study_actions.sweep import (
    add_workers,
    report_failures,
    say_how_to_continue,
    say_what_was_done,
)

HELP = "on-policy APA, PPO and AWR against a learned reward in the small world"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the action."""
    add_output_dir(parser)
    parser.add_argument(
        "--algorithms", nargs="+", default=["apa", "ppo", "awr"],
        help="some of apa, ppo and awr; default: all three",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the runs; default: 0 1 2"
    )
    parser.add_argument(
        "--apa_lambdas", nargs="+", type=float, help="lambda of APA; default: 0.05 0.1 0.2 0.5 1"
    )
    parser.add_argument(
        "--whitened_lambdas", nargs="*", type=float,
        help="lambda of APA with whitened advantages; default: 0.2 1",
    )  # fmt: skip
    parser.add_argument(
        "--ppo_coefs", nargs="+", type=float, help="KL cost of PPO; default: 0 0.05 0.1 0.2 0.5"
    )
    parser.add_argument(
        "--awr_lambdas", nargs="+", type=float, help="lambda of AWR; default: 0.2 0.5 1 2"
    )
    parser.add_argument("--preset", default="H", help="world: H (harsh) or M (mild); default: H")
    parser.add_argument("--size", default="d32", help="model size: d12, d32 or d64; default: d32")
    parser.add_argument(
        "--iterations", type=int, default=40, help="iterations of each run; default: 40"
    )
    add_workers(parser)
    parser.add_argument("--dry_run", action="store_true", help="list the runs, and do none")


def run(options: argparse.Namespace) -> int:
    """0; 1 if a run failed; 130 after Ctrl-C."""
    from rich.console import Console

    from fastdaa.study.kept_runs import POINTS
    from fastdaa.study.online_plan import STRENGTHS, WHITENED_APA, online_grid
    from fastdaa.study.online_sweep import online_rows, online_sweep
    from fastdaa.study.pool import worker_count

    worker_count(options.workers)

    given = {"apa": options.apa_lambdas, "ppo": options.ppo_coefs, "awr": options.awr_lambdas}
    strengths = {name: tuple(values or STRENGTHS[name]) for name, values in given.items()}
    white = WHITENED_APA if options.whitened_lambdas is None else tuple(options.whitened_lambdas)
    runs = online_grid(
        options.algorithms, options.seeds, preset=options.preset, size=options.size,
        strengths=strengths, whitened=white, iterations=options.iterations,
    )  # fmt: skip
    if options.dry_run:
        print("\n".join(run.id for run in runs))
        return 0
    console = Console()
    output = Path(options.output_dir)
    try:
        result = online_sweep(runs, output, workers=options.workers, console=console)
    except KeyboardInterrupt:
        say_how_to_continue(options.output_dir)
        return INTERRUPTED
    said = f"{result.finished} done in {result.seconds:.0f} s"
    say_what_was_done(console, said, result, output / POINTS)
    rows = online_rows(runs, output)
    if any(row.get("iteration") for row in rows):
        _show(console, rows, output)
    return report_failures(result.failed)


def _show(console, rows, output: Path) -> None:  # type: ignore[no-untyped-def]
    """The picture, and what is seen in it."""
    from fastdaa.study.figures.online import picture
    from fastdaa.study.figures.style import render, save_png
    from fastdaa.study.online_words import sentences

    save_png(render(picture(rows), "wide"), output / "online.png")
    for sentence in sentences(rows):
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print(f"{output}/online.png", highlight=False, soft_wrap=True)
