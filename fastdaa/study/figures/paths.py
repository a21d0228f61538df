"""What happens within training: quality against distance, and against the part that is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.study.curves import Row, distinct, mean_point, series_name, split, sweeps
from fastdaa.study.figures.course import are_single_runs, draw_time, runs_of, time_sentence
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import (
    DISTANCE_LABEL,
    MUTED,
    STEP_MARKERS,
    Layout,
    Picture,
    label_axes,
    legend_below,
    panels,
    step_colours,
)
from fastdaa.study.results import Results
from fastdaa.study.wording import join, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Within one training"
NEEDS = Needs("fastdaa study sweep", "checkpoints during training")


class Path(NamedTuple):
    """Checkpoints of one setting, averaged over seeds."""

    name: str
    fractions: list[float]
    """Of training; from checkpoints where the table has no fractions."""
    distances: list[float]
    scores: list[float]

    @property
    def peak(self) -> float:
        """The fraction of training at the best score."""
        return self.fractions[self.scores.index(max(self.scores))]


def pictures(results: Results) -> list[Picture]:
    """One picture a preset, two panels a loss."""
    found = []
    for preset, rows in sweeps(results.rows).items():
        if are_single_runs(rows):
            found += _single_runs(results, preset, rows)
            continue
        losses = {name: paths(group) for name, group in split(rows, series_name).items()}
        losses = {name: lines for name, lines in losses.items() if lines}
        if losses:
            told, drawing = sentence(losses), _drawing(results, losses)
            found.append(Picture.of_preset(preset, "paths", TITLE, told, drawing))
    return found


def _single_runs(results: Results, preset: Any, rows: Sequence[Row]) -> list[Picture]:
    """Score and KL over the steps, of runs with two or more checkpoints."""
    runs = [row for run in runs_of(rows).values() if len(run) > 1 for row in run]
    if not runs:
        return []
    told, drawing = time_sentence(runs), draw_time(results, runs)
    return [Picture.of_preset(preset, "paths", TITLE, told, drawing)]


def paths(rows: Sequence[Row]) -> list[Path]:
    """A path for every beta (every run, without betas) with three or more checkpoints."""
    last = {
        run: max(row["checkpoint"] for row in group) for run, group in split(rows, "run").items()
    }

    def fraction(row: Row) -> float:
        known = row.get("fraction")
        return float(known if known is not None else row["checkpoint"] / max(last[row["run"]], 1))

    found = []
    by_setting = split(rows, lambda row: row["run"] if row.get("beta") is None else row["beta"])
    for setting, group in by_setting.items():
        steps = split(group, lambda row: round(fraction(row), 3))
        steps = {step: steps[step] for step in sorted(steps)}
        if len(steps) < 3:
            continue
        points = [mean_point(rows) for rows in steps.values()]
        name = f"{setting:g}" if isinstance(setting, float | int) else str(setting)
        found.append(
            Path(name, list(steps), [p.distance for p in points], [p.score for p in points])
        )
    return found


def sentence(losses: dict[str, list[Path]]) -> str:
    """When the runs that go farthest and those that stay nearest are at their best."""
    parts = []
    for name, lines in losses.items():
        ranked = sorted(lines, key=lambda line: line.distances[-1])
        told = [f"its farthest run (√KL {number(ranked[-1].distances[-1])}) is best at "
                f"{ranked[-1].peak:.0%} of training"]  # fmt: skip
        if len(ranked) > 1:
            told.append(f"its nearest (√KL {number(ranked[0].distances[-1])}) at "
                        f"{ranked[0].peak:.0%}")  # fmt: skip
        parts.append(f"{name}: {join(told)}")
    return "; ".join(parts) + "."


def _drawing(results: Results, losses: dict[str, list[Path]]) -> Callable[[Layout], Figure]:
    names = list(dict.fromkeys(line.name for lines in losses.values() for line in lines))
    betas = distinct((row for row in results.rows), "beta")
    colours = dict(zip(names, step_colours(len(names)), strict=True))
    markers = dict(zip(names, cycle(STEP_MARKERS)))
    few = len(names) <= 12

    def draw(layout: Layout) -> Figure:
        count = len(losses)
        figure, axes = panels(layout, 2 * count, columns=max(count, 2), height=2.8, share_y=True)
        # In one column the two panels of a loss stand together; else one row for each kind.
        step = 1 if layout == "narrow" else count
        for place, (name, lines) in enumerate(losses.items()):
            first = 2 * place if step == 1 else place
            near, time = axes[first], axes[first + step]
            for line in lines:
                look: Any = {
                    "color": colours[line.name],
                    "linewidth": 1.5,
                    "marker": markers[line.name],
                    "markersize": 4,
                    "label": line.name if few else None,
                }
                # In the world the reference is known to have gold 0.
                start = [0.0] if results.in_world else []
                near.plot([*start, *line.distances], [*start, *line.scores], **look)
                time.plot([100 * f for f in line.fractions], line.scores, **look)
            for ax in (near, time):
                if results.in_world:
                    ax.axhline(0, color=MUTED, linewidth=0.8)
                ax.set_title(name)
            label_axes([near], DISTANCE_LABEL, results.score_label)
            label_axes([time], "training done (%)", results.score_label)
        title = "beta" if betas else "run"
        legend_below(figure, axes, columns=8 if layout == "wide" else 4, title=title)
        return figure

    return draw
