"""Quality against the distance from the reference: one panel a loss, one figure a preset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastdaa.study.curves import (
    Row,
    curve,
    distance,
    finals,
    hump,
    score_error,
    series_name,
    split,
    sweeps,
)
from fastdaa.study.figures.course import are_single_runs, draw_quality, quality_sentence
from fastdaa.study.figures.fitted import fitted_curves, fitted_label
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import (
    DISTANCE_LABEL,
    INK,
    MUTED,
    Layout,
    Picture,
    label_axes,
    legend_below,
    legend_columns,
    look_of,
    panels,
)
from fastdaa.study.results import Results
from fastdaa.study.wording import join, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Quality against distance"
NEEDS = Needs("fastdaa study sweep")
_SEED_MARKERS = ("o", "s", "^", "D", "v", "P")


def pictures(results: Results) -> list[Picture]:
    """One picture a preset."""
    return [
        Picture.of_preset(preset, "hump", TITLE, sentence(rows), _drawing(results, preset, rows))
        for preset, rows in sweeps(results.rows).items()
    ]


def sentence(rows: Sequence[Row]) -> str:
    """Which losses rise and fall, and where their best points lie."""
    humped, rising, unknown = [], [], []
    if are_single_runs(rows):
        return quality_sentence(rows)
    for name, group in split(rows, series_name).items():
        shape = hump(curve(group))
        if shape is None:
            unknown.append(name)
        elif shape.interior:
            where = f"√KL {number(shape.best.distance)}"
            beta = "" if shape.best.beta is None else f" (beta {shape.best.beta:g})"
            humped.append(
                f"{name} is best at {where}{beta} with {number(shape.best.score, sign=True)} and "
                f"loses {number(shape.fall)} beyond it"
            )
        else:
            rising.append(
                f"{name} (best {number(shape.best.score, sign=True)} at √KL "
                f"{number(shape.best.distance)}, farthest {number(shape.farthest.score, sign=True)}"
                f" at {number(shape.farthest.distance)})"
            )
    parts = []
    if humped:
        parts.append("Quality rises and then falls: " + "; ".join(humped) + ".")
    if rising:
        parts.append(f"No fall beyond noise inside the range for {join(rising)}.")
    if unknown:
        parts.append(f"Too few runs to tell for {join(unknown)}.")
    if any(score_error(row) for row in rows):
        parts.append("Bars: one standard error of a measurement.")
    return " ".join(parts)


def _drawing(results: Results, preset: Any, rows: Sequence[Row]) -> Callable[[Layout], Figure]:
    groups = split(rows, series_name)
    laws = {name: fitted_curves(results, preset, name) for name in groups}
    law_label = fitted_label(results)
    if are_single_runs(rows):
        return draw_quality(results, rows, laws, law_label)

    def draw(layout: Layout) -> Figure:
        figure, axes = panels(layout, len(groups), height=3.2, share_y=True, share_x=True)
        looks = look_of(list(groups))
        for ax, (name, group) in zip(axes, groups.items(), strict=True):
            if results.in_world:
                ax.axhline(0, color=MUTED, linewidth=0.8)
            _draw_panel(ax, group, looks[name].colour)
            for x, y in laws[name]:
                ax.plot(x, y, color=INK, linewidth=1.1, linestyle=(0, (1, 1.6)), alpha=0.75,
                        label=law_label, zorder=4)  # fmt: skip
            ax.set_title(name)
        # A point at the reference itself is not cut in half.
        near, far = min(map(distance, rows)), max(map(distance, rows))
        axes[0].set_xlim(left=0 if near > 0.02 * far else -0.03 * far or None)
        label_axes(axes, DISTANCE_LABEL, results.score_label)
        legend_below(figure, axes, columns=legend_columns(layout, 6), neutral=True)
        return figure

    return draw


def _draw_panel(ax: Axes, rows: Sequence[Row], colour: str) -> None:
    last = {id(row) for row in finals(rows)}
    early = [row for row in rows if id(row) not in last]
    if early:
        ax.scatter(
            [distance(row) for row in early],
            [row["score"] for row in early],
            s=13, color=colour, alpha=0.4, linewidth=0, label="during training",
        )  # fmt: skip
    seeds = split(finals(rows), "seed")
    for place, (seed, ends) in enumerate(seeds.items()):
        x, y = [distance(row) for row in ends], [row["score"] for row in ends]
        ax.scatter(
            x, y, s=26, color=colour, linewidth=0, alpha=0.85, zorder=3,
            marker=_SEED_MARKERS[place % len(_SEED_MARKERS)],
            label="at its end" if len(seeds) == 1 else f"at its end, seed {seed}",
        )  # fmt: skip
        errors = [score_error(row) or 0.0 for row in ends]
        if any(errors):
            ax.errorbar(x, y, yerr=errors, fmt="none", ecolor=colour, elinewidth=0.9, capsize=2,
                        alpha=0.6)  # fmt: skip
    points = curve(rows)
    if sum(point.beta is not None for point in points) > 1:
        ax.plot(
            [point.distance for point in points],
            [point.score for point in points],
            color=colour, linewidth=1.8, zorder=2,
            label="mean of the seeds" if len(seeds) > 1 else "ends of all betas",
        )  # fmt: skip
