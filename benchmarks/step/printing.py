"""What the step benchmark adds to the shared table: losses side by side."""

from __future__ import annotations

from collections.abc import Sequence

from fastdaa.benchmarks.rows import Row

_SHOWN_LOSSES = 5


def show(rows: Sequence[Row]) -> None:
    """Print the shared table, then the first losses, case by case."""
    from rich.console import Console

    from fastdaa.benchmarks.table import show as show_table

    show_table(rows, title="The whole training step")
    console = Console(width=max(Console().width, 120))
    for case in dict.fromkeys((row["case"], row["case_params"].get("loss")) for row in rows):
        same = [row for row in rows if (row["case"], row["case_params"].get("loss")) == case]
        console.print(f"\n{case[0]}, loss {case[1]}: first losses; equal batches have to agree")
        for line in loss_lines(same):
            console.print(line, highlight=False)


def loss_lines(rows: Sequence[Row]) -> list[str]:
    """The oracle's first losses and every contender's, aligned; by order of pairs."""
    lines: list[tuple[str, str]] = []
    measured = [row for row in rows if row.get("losses")]
    for is_sorted in (False, True):
        same = [row for row in measured if ("-sorted" in row["contender"]) is is_sorted]
        if same:
            order = "sorted" if is_sorted else "given order"
            lines.append((f"oracle, {order}", _losses(same[0]["expected_losses"])))
            lines += [(row["contender"], _losses(row["losses"])) for row in same]
    width = max((len(name) for name, _ in lines), default=0)
    return [f"  {name:<{width}}  {losses}" for name, losses in lines]


def _losses(values: Sequence[float | str]) -> str:
    return "  ".join(f"{float(value):.6f}" for value in values[:_SHOWN_LOSSES])
