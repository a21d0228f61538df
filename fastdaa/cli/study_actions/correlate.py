"""``fastdaa study correlate``: what goes with quality in a table of checkpoints, and what does not.

Implicit-reward accuracy and held-out loss against the score, per loss, per size and pooled; length
against log-ratio by size and KL budget; chosen log-ratio against KL(reference || policy)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from fastdaa.cli.study_actions.table_arguments import add_table_arguments, beside, read

HELP = "correlate accuracy, loss, length and log-ratios with quality and KL"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the action."""
    add_table_arguments(parser)
    parser.add_argument(
        "--budgets", nargs="+", type=float, metavar="KL",
        help="ends of the KL ranges for length, in nats (default: thirds of the rows)",
    )  # fmt: skip
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="JSON file (default: correlations.json in the folder of a study or run, else "
        "TABLE_correlations.json)",
    )


def run(options: argparse.Namespace) -> int:
    """Correlates, prints and writes; 0."""
    from rich.console import Console

    from fastdaa.study.correlate import CorrelateSettings, correlate_table
    from fastdaa.study.json_file import write_json

    settings = CorrelateSettings(
        score=options.score,
        final_only=options.final_only,
        budgets=None if options.budgets is None else tuple(options.budgets),
        repeats=options.bootstrap,
        confidence=options.confidence,
        seed=options.seed,
    )
    content = correlate_table(read(options), settings)
    path = beside(options, "correlations.json")
    write_json(path, content)
    console = Console()
    if content["quality"]:
        console.print(_quality_table(content["quality"], settings.confidence))
    if content["length"]:
        console.print(_length_table(content["length"]))
    for sentence in content["summary"]:
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print(f"all correlations: {path}", highlight=False, soft_wrap=True)
    return 0


def _quality_table(entries: list[dict[str, Any]], confidence: float) -> Any:
    from rich.table import Table

    from fastdaa.study.fit_words import group_name

    table = Table(title=f"against {entries[0]['y']}, {confidence:.0%} intervals over runs")
    for name in ("what", "rows", "n", "Pearson", "Spearman"):
        table.add_column(name, justify="left" if name in ("what", "rows") else "right")
    last = None
    for entry in entries:
        table.add_row(
            "" if entry["x"] == last else entry["x"],
            group_name(entry["group"]),
            str(entry["n"]),
            _shown(entry, "pearson"),
            _shown(entry, "spearman"),
        )
        last = entry["x"]
    return table


def _shown(entry: Mapping[str, Any], name: str) -> str:
    if entry[name] is None:
        return "not defined"
    ends = entry[f"{name}_interval"]
    interval = "" if ends is None else f" ({ends[0]:+.2f} to {ends[1]:+.2f})"
    return f"{entry[name]:+.2f}{interval}"


def _length_table(entries: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="R^2 of the log-ratio on the length")
    for name in ("column", "size", "KL (nats)", "n", "mean", "range"):
        table.add_column(name, justify="left" if name in ("column", "size") else "right")
    for entry in entries:
        kl = entry["kl_range"]
        table.add_row(
            entry["column"],
            entry["size"] or "",
            "all" if kl is None else f"{kl[0]:.3g} to {kl[1]:.3g}",
            str(entry["n"]),
            f"{entry['mean']:.2f}",
            f"{entry['least']:.2f} to {entry['greatest']:.2f}",
        )
    return table
