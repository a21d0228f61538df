"""``fastdaa study tree``: the small problems with exact answers.

Three responses whose loss does not see where the mass is, a tree in which training on one pair
moves mass to answers outside the data, and bandits whose solutions are known in closed form."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastdaa.counted import counted

HELP = "exact small problems: null space, tree with one pair, closed forms"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the action."""
    parser.add_argument(
        "--losses", nargs="+", default=["dpo", "ipo", "slic"],
        help="losses; default: dpo ipo slic",
    )  # fmt: skip
    parser.add_argument(
        "--betas", nargs="+", type=float, default=[0.01, 0.1, 0.5],
        help="betas; default: 0.01 0.1 0.5",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=6, help="number of seeds (default: 6)")
    parser.add_argument(
        "--workers", type=int, help="processes (default: one a core, at most one a seed and pair)"
    )
    parser.add_argument(
        "--output", metavar="FILE", default="study_output/tree.json",
        help="JSON file of the results; default: study_output/tree.json",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Runs, prints and writes; 0, or 1 where a claim does not hold."""
    from rich.console import Console
    from rich.progress import Progress

    from fastdaa.study.exact import failures, run_exact
    from fastdaa.study.json_file import write_json
    from fastdaa.study.pool import cores
    from fastdaa.study.tree import TreeSettings
    from fastdaa.writable import check_writable

    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers: expected at least 1, got {options.workers}")
    settings = TreeSettings(
        losses=tuple(options.losses), betas=tuple(options.betas), seeds=options.seeds
    )
    check_writable(Path(options.output).parent, "--output")
    if Path(options.output).is_dir():
        raise IsADirectoryError(f"--output: expected a file, {options.output} is a folder")
    tasks = len(settings.pairs) * settings.seeds
    workers = min(options.workers or cores(), tasks)
    console = Console()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("training trees", total=settings.runs)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        content = run_exact(settings, advance, workers)
    write_json(options.output, content)
    console.print(_null_space_table(content["null_space"]))
    for pair in settings.pairs:
        console.print(_tree_table(pair, content))
    for sentence in content["summary"]:
        console.print(f"- {sentence}", highlight=False, markup=False)
    wrong = failures(content)
    checks = len(content["oracles"]) + len(content["checks"]) + 2
    console.print(f"{checks - len(wrong)} of {checks} checks hold, {content['seconds']:.0f} s")
    for claim in wrong:
        console.print(f"does not hold: {claim}", style="red", highlight=False, markup=False)
    console.print(f"everything: {options.output}", highlight=False, soft_wrap=True)
    return 1 if wrong else 0


def _null_space_table(content: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"three responses, data y1 > y2 and y2 > y1: {content['loss']} loss")
    for name in ("policy", "p(y1), p(y2), p(y3)", "loss"):
        table.add_column(name, justify="right" if name == "loss" else "left")
    for policy in content["policies"]:
        masses = ", ".join(f"{p:.3g}" for p in policy["probabilities"])
        table.add_row(policy["name"], masses, f"{policy['loss']:.6f}")
    return table


def _tree_table(pair: str, content: dict[str, Any]) -> Any:
    from rich.table import Table

    leaves = content["pairs"][pair]
    cells = [cell for cell in content["table"] if cell["pair"] == pair]
    table = Table(
        title=f"tree, pair {pair} ({leaves['chosen']} over {leaves['rejected']}), "
        f"mean of {counted(cells[0]['seeds'], 'seed')}"
    )
    table.add_column("loss")
    for name in ("beta", "outside", "chosen", "rejected", "KL", "margin"):
        table.add_column(name, justify="right")
    for cell in cells:
        start, end = cell["start"], cell["end"]
        table.add_row(
            cell["loss"],
            f"{cell['beta']:g}",
            *(f"{start[n]:.2f} to {end[n]:.2f}" for n in ("outside", "chosen", "rejected")),
            f"{end['kl']:.2f}",
            f"{end['margin']:.2f}",
        )
    return table
