"""The tree problem: where one preference pair sends the mass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastdaa.counted import counted
from fastdaa.study.curves import LOSS_NAMES
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import (
    INK,
    Layout,
    Picture,
    label_axes,
    legend_below,
    legend_columns,
    look_of,
    panels,
)
from fastdaa.study.results import Results
from fastdaa.study.wording import capitalised, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Mass outside the data, in the tree problem"
NEEDS = Needs("fastdaa study tree", file="tree.json")
Cell = Mapping[str, Any]


def cells_of(results: Results) -> dict[str, list[Cell]]:
    """Rows of the table of ``tree.json`` by preference pair."""
    found: dict[str, list[Cell]] = {}
    for cell in results.tree.get("table", ()):
        found.setdefault(cell["pair"], []).append(cell)
    return found


def pair_title(results: Results, pair: str) -> str:
    """``near duplicate: aab over aaa``."""
    leaves = results.tree.get("pairs", {}).get(pair)
    words = pair.replace("_", " ")
    return f"{words}: {leaves['chosen']} over {leaves['rejected']}" if leaves else words


def pictures(results: Results) -> list[Picture]:
    """One picture, one panel a preference pair."""
    pairs = cells_of(results)
    if not pairs:
        return []

    def draw(layout: Layout) -> Figure:
        figure, axes = panels(layout, len(pairs), columns=2, height=3.3, share_y=True)
        for ax, (pair, cells) in zip(axes, pairs.items(), strict=True):
            _draw_panel(ax, cells)
            ax.set_title(pair_title(results, pair))
        label_axes(axes, "beta", "mass outside the pair\n(probability, end of training)")
        legend_below(figure, axes, columns=legend_columns(layout, 4))
        return figure

    return [Picture("tree", TITLE, sentence(results), draw)]


def loss_name(cell: Cell) -> str:
    return LOSS_NAMES.get(str(cell["loss"]).lower(), str(cell["loss"]))


def sentence(results: Results) -> str:
    """In how many settings the mass outside grew, and its range, for each pair."""
    parts = []
    for pair, cells in cells_of(results).items():
        grown = [cell for cell in cells if cell["end"]["outside"] > cell["start"]["outside"]]
        most = max(cells, key=lambda cell: cell["end"]["outside"])
        least = min(cells, key=lambda cell: cell["end"]["outside"])
        start = sum(cell["start"]["outside"] for cell in cells) / len(cells)
        title = pair_title(results, pair)
        parts.append(
            f"{capitalised(title)}: the mass outside the pair grew from {number(start)} "
            f"in {len(grown)} of {counted(len(cells), 'setting')}, to "
            f"{number(least['end']['outside'])} ({loss_name(least)}, beta {least['beta']:g}) at "
            f"least and {number(most['end']['outside'])} ({loss_name(most)}, beta "
            f"{most['beta']:g}) at most."
        )
    if any(cell["seeds"] > 1 for cells in cells_of(results).values() for cell in cells):
        parts.append("Points: means; bars: all seeds.")
    return " ".join(parts)


def _draw_panel(ax: Axes, cells: Sequence[Cell]) -> None:
    betas = sorted({cell["beta"] for cell in cells})
    names = list(dict.fromkeys(map(loss_name, cells)))
    looks = look_of(names)
    start = sum(cell["start"]["outside"] for cell in cells) / len(cells)
    ax.axhline(start, color=INK, linewidth=1, linestyle="--", label="before training")
    for place, name in enumerate(names):
        mine = sorted((c for c in cells if loss_name(c) == name), key=lambda c: c["beta"])
        x = [betas.index(c["beta"]) + 0.16 * (place - (len(names) - 1) / 2) for c in mine]
        y = [c["end"]["outside"] for c in mine]
        low = [max(m - c["outside_range"][0], 0.0) for m, c in zip(y, mine, strict=True)]
        high = [max(c["outside_range"][1] - m, 0.0) for m, c in zip(y, mine, strict=True)]
        ax.errorbar(
            x, y, yerr=[low, high], color=looks[name].colour, marker=looks[name].marker,
            markersize=7, linestyle="none", elinewidth=1.2, capsize=3, label=name,
        )  # fmt: skip
    ax.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    ax.set_xlim(-0.5, len(betas) - 0.5)
    ax.set_ylim(-0.03, 1.05)
    ax.grid(axis="x", visible=False)
