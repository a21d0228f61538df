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
    series_name,
    split,
    sweeps,
)
from fastdaa.study.figures.fitted import fitted_curves
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
from fastdaa.study.wording import count, join, number, preset_suffix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Quality against distance"
NEEDS = "points.jsonl, by `fastdaa study sweep`"
_SEED_MARKERS = ("o", "s", "^", "D", "v", "P")


def pictures(results: Results) -> list[Picture]:
    """One picture a preset."""
    found = []
    for preset, rows in sweeps(results.rows).items():
        suffix = preset_suffix(preset)
        found.append(
            Picture(
                name="hump" if preset is None else f"hump-{preset}",
                title=f"{TITLE}{suffix}",
                sentence=sentence(rows),
                drawing=_drawing(results, preset, rows),
            )
        )
    return found


def sentence(rows: Sequence[Row]) -> str:
    """Which losses rise and fall, and where their best points lie."""
    humped, rising, unknown = [], [], []
    if all(row.get("beta") is None for row in rows):
        return _runs_sentence(rows)
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
    return " ".join(parts)


def _runs_sentence(rows: Sequence[Row]) -> str:
    """For runs that are no sweep: the best and the last checkpoint of those that went farthest."""
    runs = {name: sorted(run, key=distance) for name, run in split(rows, "run").items()}
    told = []
    for name in sorted(runs, key=lambda name: -distance(runs[name][-1]))[:3]:
        best = max(runs[name], key=lambda row: row["score"])
        last = finals(runs[name])[0]
        told.append(
            f"{name} is best at √KL {number(distance(best))} with {number(best['score'], 3)} and "
            f"ends at √KL {number(distance(last))} with {number(last['score'], 3)}"
        )
    rest = len(runs) - len(told)
    return "; ".join(told) + (f" ({count(rest, 'nearer run')} not told)." if rest else ".")


def _drawing(results: Results, preset: Any, rows: Sequence[Row]) -> Callable[[Layout], Figure]:
    groups = split(rows, series_name)

    def draw(layout: Layout) -> Figure:
        figure, axes = panels(layout, len(groups), height=3.2, share_y=True, share_x=True)
        looks = look_of(list(groups))
        for ax, (name, group) in zip(axes, groups.items(), strict=True):
            if results.in_world:
                ax.axhline(0, color=MUTED, linewidth=0.8)
            _draw_panel(ax, group, looks[name].colour)
            for x, y in fitted_curves(results, preset, name):
                ax.plot(x, y, color=INK, linewidth=1.1, linestyle=(0, (1, 1.6)), alpha=0.75,
                        label="fitted log law", zorder=4)  # fmt: skip
            ax.set_title(name)
        axes[0].set_xlim(left=0)
        label_axes(axes, DISTANCE_LABEL, results.score_label)
        legend_below(figure, axes, columns=legend_columns(layout, 6), neutral=True)
        return figure

    return draw


def _draw_panel(ax: Axes, rows: Sequence[Row], colour: str) -> None:
    last = {id(row) for row in finals(rows)}
    early = [row for row in rows if id(row) not in last]
    ax.scatter(
        [distance(row) for row in early],
        [row["score"] for row in early],
        s=9, color=colour, alpha=0.3, linewidth=0, label="during training",
    )  # fmt: skip
    for place, (seed, ends) in enumerate(split(finals(rows), "seed").items()):
        ax.scatter(
            [distance(row) for row in ends],
            [row["score"] for row in ends],
            s=26, color=colour, linewidth=0, alpha=0.85, zorder=3,
            marker=_SEED_MARKERS[place % len(_SEED_MARKERS)],
            label="at its end" if seed is None else f"at its end, seed {seed}",
        )  # fmt: skip
    points = curve(rows)
    if any(point.beta is not None for point in points):
        ax.plot(
            [point.distance for point in points],
            [point.score for point in points],
            color=colour, linewidth=1.8, zorder=2, label="mean of the seeds",
        )  # fmt: skip
