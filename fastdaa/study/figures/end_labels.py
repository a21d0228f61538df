"""Labels at the right of a panel, each beside the end of its line, that do not touch each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FONT_SIZE = 8.0
_LINE = 1.3
"""Height of a line of text over its font size."""
_POINTS_PER_INCH = 72


class EndLabel(NamedTuple):
    """What stands beside the last point of a line."""

    text: str
    x: float
    y: float
    """Of the point, in data coordinates."""
    colour: str


def label_ends(figure: Figure, ax: Axes, labels: Sequence[EndLabel]) -> None:
    """Writes the labels right of the panel, as near to their heights as they fit.

    Call it when all else is drawn, legends too: the layout has to be known. A thin line leads from
    each point to its label.
    """
    figure.draw_without_rendering()
    height = ax.get_window_extent().height / figure.dpi * _POINTS_PER_INCH
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [to_axes.transform((label.x, label.y))[1] for label in labels]
    places = spread(heights, _LINE * _FONT_SIZE / height)
    for label, place in zip(labels, places, strict=True):
        ax.annotate(
            label.text, (label.x, label.y), xytext=(1.03, place), textcoords="axes fraction",
            fontsize=_FONT_SIZE, va="center", color=label.colour,
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.5,
                        "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Places within [0, 1], at least ``gap`` apart, with the least squares of the distances.

    Args:
        heights: where each of them would best be.
        gap: is made smaller where so many do not fit.
    """
    if len(heights) < 2:
        return [min(max(height, 0.0), 1.0) for height in heights]
    gap = min(gap, 1 / (len(heights) - 1))
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    # Less its gaps, an order of places only has not to fall: the pooled means of what would.
    pools: list[tuple[float, int]] = []
    for rank, place in enumerate(order):
        mean, count = heights[place] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            above, more = pools.pop()
            mean = (above * more + mean * count) / (more + count)
            count += more
        pools.append((mean, count))
    top = 1 - (len(heights) - 1) * gap
    level = [min(max(mean, 0.0), top) for mean, count in pools for _ in range(count)]
    places = [0.0] * len(heights)
    for rank, place in enumerate(order):
        places[place] = level[rank] + rank * gap
    return places
