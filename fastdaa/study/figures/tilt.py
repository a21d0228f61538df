"""Over-optimisation without training a policy: tilted and best-of-n policies of a reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.counted import counted
from fastdaa.study.curves import distance, split
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import (
    BLUE,
    DISTANCE_LABEL,
    MUTED,
    ORANGE,
    Layout,
    Picture,
    label_axes,
    legend_below,
    legend_columns,
    panels,
)
from fastdaa.study.results import Results
from fastdaa.study.wording import capitalised, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Without training a policy"
NEEDS = Needs("fastdaa study world", file="tilt.jsonl")
NAMES = {"tilt": "tilting", "bon": "best of n"}
_COLOURS = {"tilt": BLUE, "bon": ORANGE}
Row = Mapping[str, Any]


class World(NamedTuple):
    """A kind of world and the number of pairs that its reward model was trained on."""

    preset: str
    pairs: int
    penalty: float
    violations: float
    """Share of neighbours of the same class in the reference's data."""

    @property
    def title(self) -> str:
        return f"preset {self.preset}, {counted(self.pairs, 'pair')}"

    @property
    def heading(self) -> str:
        return (
            f"{self.preset}: penalty {self.penalty:g}, violations {self.violations:.0%}\n"
            f"{counted(self.pairs, 'pair')}"
        )


def worlds(results: Results) -> dict[World, list[Row]]:
    """Points of both families, seeds together, in the order of the file."""
    found: dict[World, list[Row]] = {}
    for row in results.tilt:
        world = World(str(row["preset"]), int(row["pairs"]), row["penalty"], row["violation_share"])
        found.setdefault(world, []).append(row)
    return found


def pictures(results: Results) -> list[Picture]:
    """One picture, one panel a world."""
    groups = worlds(results)
    if not groups:
        return []

    def draw(layout: Layout) -> Figure:
        figure, axes = panels(layout, len(groups), columns=3, height=2.8, share_x=True)
        for ax, (world, rows) in zip(axes, groups.items(), strict=True):
            _draw_panel(ax, rows)
            ax.set_title(world.heading)
        # Once everything is drawn: it holds the other end of the shared axis where it is.
        axes[0].set_xlim(left=0)
        label_axes(axes, DISTANCE_LABEL, "gold and proxy reward\n(reference std. deviations)")
        legend_below(figure, axes, columns=legend_columns(layout, 4))
        return figure

    return [Picture("tilt", TITLE, sentence(groups), draw)]


def sentence(groups: Mapping[World, Sequence[Row]]) -> str:
    """In how many curves gold falls beyond its best, and where it does so most."""
    parts = []
    for algorithm, name in NAMES.items():
        falls = []
        for world, rows in groups.items():
            for points in split((r for r in rows if r["algorithm"] == algorithm), "run").values():
                best = max(points, key=lambda row: row["gold"])
                end = max(points, key=distance)
                falls.append((best["gold"] - end["gold"], world, best, end))
        if not falls:
            continue
        fallen = [fall for fall in falls if fall[0] > 0]
        _, world, best, end = max(falls, key=lambda fall: fall[0])
        parts.append(
            f"{name}: gold falls beyond its best in {len(fallen)} of "
            f"{counted(len(falls), 'curve')}, most in {world.title}, from "
            f"{number(best['gold'], sign=True)} at √KL {number(distance(best))} to "
            f"{number(end['gold'], sign=True)} at {number(distance(end))}, where the reward "
            f"that it was made for is {number(end['proxy'], sign=True)}"
        )
    text = "; ".join(parts) + "."
    return capitalised(text)


def _draw_panel(ax: Axes, rows: Sequence[Row]) -> None:
    ax.axhline(0, color=MUTED, linewidth=0.8)
    for algorithm, name in NAMES.items():
        for points in split((r for r in rows if r["algorithm"] == algorithm), "run").values():
            points = sorted(points, key=distance)
            x = [distance(row) for row in points]
            ax.plot(x, [row["proxy"] for row in points], color=_COLOURS[algorithm], linewidth=1.1,
                    linestyle=(0, (4, 2)), alpha=0.8, label=f"proxy, {name}")  # fmt: skip
            ax.plot(x, [row["gold"] for row in points], color=_COLOURS[algorithm], linewidth=1.9,
                    label=f"gold, {name}")  # fmt: skip
