"""Single runs, such as one's own: a line from the start to the end of each, with error bars.

The pictures of :mod:`~fastdaa.study.figures.hump` and :mod:`~fastdaa.study.figures.paths` for
tables in which no loss was run with two betas, so that there is no curve over beta to draw.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from fastdaa.counted import counted
from fastdaa.study.curves import (
    Row,
    distance,
    distance_errors,
    distinct,
    kl_error,
    score_error,
    series_name,
    split,
)
from fastdaa.study.figures.style import (
    DISTANCE_LABEL,
    INK,
    MUTED,
    PAPER,
    STEPS,
    Layout,
    label_axes,
    legend_below,
    legend_columns,
    look_of,
    panels,
    step_colours,
)
from fastdaa.study.results import Results
from fastdaa.study.wording import join, number, with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMES = 12
"""More runs than this are not named in the legend."""
_TOLD = 3
_START, _DURING, _END = "start of training", "during training", "end of training"
_SIZES = {_START: 46, _DURING: 20, _END: 46}
_CROWDED = 60
"""With more checkpoints than this, those within a run are small, and their bars faint."""
_DASHES = ("-", (0, (4, 1.5)))
Curves = Sequence[tuple[np.ndarray, np.ndarray]]


class _Bars(NamedTuple):
    """Points of a run and their error bars, ``[n]`` and ``[2, n]`` below and above."""

    x: list[float]
    y: list[float]
    x_errors: np.ndarray | None
    y_errors: np.ndarray | None


def are_single_runs(rows: Sequence[Row]) -> bool:
    """Whether no series has two betas whose runs could be joined to a curve."""
    return all(len(distinct(group, "beta")) < 2 for group in split(rows, series_name).values())


def runs_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Checkpoints of every run by their step; ``run2`` comes before ``run10``."""
    runs = split(rows, "run")
    return {
        name: sorted(runs[name], key=lambda row: row["checkpoint"])
        for name in sorted(runs, key=_natural)
    }


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)]


def quality_sentence(rows: Sequence[Row]) -> str:
    """Where the runs that went farthest are best, where they end, and what is noise."""
    runs = runs_of(rows)
    far = sorted(runs, key=lambda name: -max(map(distance, runs[name])))
    told = [_one_run(name, runs[name]) for name in far[:_TOLD]]
    rest = len(runs) - len(told)
    parts = ["; ".join(told) + (f" ({counted(rest, 'nearer run')} not told)." if rest else ".")]
    if any(score_error(row) is not None for row in rows):
        parts.append("Bars are standard errors over prompts.")
    judged = [row for row in rows if row.get("declined") is not None]
    declined = [row for row in judged if row["declined"]]
    if declined:
        where = [f"{row['run']} at step {row['checkpoint']}" for row in declined]
        shown = join([*where[:4], *([f"{len(where) - 4} more"] if len(where) > 4 else [])])
        parts.append(f"Declined beyond noise, prompt by prompt: {shown}.")
    elif len(judged) > 1:
        parts.append("Compared prompt by prompt, no checkpoint has declined beyond noise.")
    return " ".join(parts)


def _one_run(name: str, run: Sequence[Row]) -> str:
    best, last = max(run, key=lambda row: row["score"]), run[-1]
    end = f"√KL {number(distance(last))} with {_score(last)}"
    if len(run) == 1:
        return f"{name} was measured once, at {end}"
    if best is last:
        return f"{name} is best at its end, at {end}"
    where = f"√KL {number(distance(best))}"
    if best["checkpoint"] == 0:
        where = "its start, before any training,"
    return f"{name} is best at {where} with {_score(best)} and ends at {end}"


def _score(row: Row) -> str:
    return with_error(row["score"], score_error(row), 3)


def time_sentence(rows: Sequence[Row]) -> str:
    """The step at which each run is best, and the KL at its end."""
    runs = runs_of(rows)
    far = sorted(runs, key=lambda name: -max(map(distance, runs[name])))
    told = []
    for name in far[:_TOLD]:
        best, last = max(runs[name], key=lambda row: row["score"]), runs[name][-1]
        kl = with_error(last["kl"], kl_error(last), 3)
        told.append(
            f"{name} is best at step {best['checkpoint']} of {last['checkpoint']}, and its KL is "
            f"{kl} nats at the end"
        )
    return "; ".join(told) + "."


def draw_quality(
    results: Results, rows: Sequence[Row], laws: Mapping[str, Curves], law_label: str
) -> Callable[[Layout], Figure]:
    """Score against distance, a panel a series, a line a run.

    Args:
        laws: fitted curves of each series.
        law_label: what the legend calls them.
    """
    groups = split(rows, series_name)

    def points(run: Sequence[Row]) -> _Bars:
        x, y = [distance(row) for row in run], [float(row["score"]) for row in run]
        return _Bars(x, y, _both([distance_errors(row) for row in run]), _score_bars(run))

    def draw(layout: Layout) -> Figure:
        figure, axes = panels(layout, len(groups), height=3.4, share_y=True, share_x=True)
        for ax, (name, group) in zip(axes, groups.items(), strict=True):
            if results.in_world:
                ax.axhline(0, color=MUTED, linewidth=0.8)
            _draw_runs(ax, name, group, points)
            for x, y in laws.get(name, ()):
                ax.plot(x, y, color=INK, linewidth=1.1, linestyle=(0, (1, 1.6)), alpha=0.75,
                        label=law_label, zorder=4)  # fmt: skip
            ax.set_title(_title(name, group))
        far = max(distance(row) for row in rows)
        if far > 0:
            axes[0].set_xlim(left=-0.04 * far)
        label_axes(axes, DISTANCE_LABEL, results.score_label)
        legend_below(figure, axes, columns=legend_columns(layout, 5))
        return figure

    return draw


def draw_time(results: Results, rows: Sequence[Row]) -> Callable[[Layout], Figure]:
    """Score and KL over the steps: two panels a series."""
    groups = split(rows, series_name)

    def score(run: Sequence[Row]) -> _Bars:
        return _Bars(_steps(run), [float(row["score"]) for row in run], None, _score_bars(run))

    def kl(run: Sequence[Row]) -> _Bars:
        errors = [None if (error := kl_error(row)) is None else (error, error) for row in run]
        return _Bars(_steps(run), [float(row["kl"]) for row in run], None, _both(errors))

    def draw(layout: Layout) -> Figure:
        figure, axes = panels(layout, 2 * len(groups), columns=2, height=3.0)
        for place, (name, group) in enumerate(groups.items()):
            left, right = axes[2 * place : 2 * place + 2]
            _draw_runs(left, name, group, score)
            _draw_runs(right, name, group, kl)
            for ax, label in ((left, results.score_label), (right, "KL (nats a sequence)")):
                ax.set_title(_title(name, group))
                ax.set_xlabel("optimiser step")
                ax.set_ylabel(label)
                ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        legend_below(figure, axes, columns=legend_columns(layout, 5))
        return figure

    return draw


def _title(name: str, rows: Sequence[Row]) -> str:
    betas = distinct(rows, "beta")
    return f"{name}, beta {betas[0]:g}" if betas else name


def _steps(run: Sequence[Row]) -> list[float]:
    return [float(row["checkpoint"]) for row in run]


def _score_bars(run: Sequence[Row]) -> np.ndarray | None:
    return _both([None if (e := score_error(row)) is None else (e, e) for row in run])


def _both(errors: Sequence[tuple[float, float] | None]) -> np.ndarray | None:
    """Errors below and above, ``[2, n]``; None where no row has one."""
    if all(error is None for error in errors):
        return None
    return np.array([error or (0.0, 0.0) for error in errors]).T


def _draw_runs(
    ax: Axes, name: str, rows: Sequence[Row], points: Callable[[Sequence[Row]], _Bars]
) -> None:
    runs = runs_of(rows)
    one = len(runs) == 1
    looks = [(look_of([name])[name].colour, _DASHES[0])] if one else _lines(len(runs))
    for (colour, dashes), (run_name, run) in zip(looks, runs.items(), strict=True):
        x, y, x_errors, y_errors = points(run)
        crowded = len(run) > _CROWDED
        if x_errors is not None or y_errors is not None:
            ax.errorbar(x, y, yerr=y_errors, xerr=x_errors, fmt="none", ecolor=colour,
                        elinewidth=0.9, capsize=0 if crowded else 2.5,
                        alpha=0.25 if crowded else 0.6)  # fmt: skip
        label = run_name if not one and len(runs) <= MOST_NAMES else None
        ax.plot(x, y, linewidth=1.6, linestyle=dashes, label=label, color=colour, zorder=2)
        for kind, places in _kinds(run).items():
            paper, small = PAPER if kind == _START else colour, crowded and kind == _DURING
            ax.scatter([x[p] for p in places], [y[p] for p in places],
                       s=2 if small else _SIZES[kind], facecolor=paper, edgecolor=colour,
                       linewidth=0.5 if small else 1.5, zorder=3)  # fmt: skip
    # The legend speaks of all runs, so its markers are grey.
    for kind in sorted(
        {kind for run in runs.values() for kind in _kinds(run)}, key=list(_SIZES).index
    ):
        ax.scatter([], [], s=_SIZES[kind], facecolor=PAPER if kind == _START else MUTED,
                   edgecolor=MUTED, linewidth=1.5, label=kind)  # fmt: skip


def _lines(count: int) -> list[tuple[str, Any]]:
    """Colours and dashes of so many runs; where there are names, no two runs look the same."""
    if not len(STEPS) < count <= MOST_NAMES:
        return [(colour, _DASHES[0]) for colour in step_colours(count)]
    return [(STEPS[n % len(STEPS)], _DASHES[n // len(STEPS)]) for n in range(count)]


def _kinds(run: Sequence[Row]) -> dict[str, list[int]]:
    """Places of the start, of the checkpoints between and of the end."""
    last = len(run) - 1
    found: dict[str, list[int]] = {}
    for place, row in enumerate(run):
        kind = _START if row["checkpoint"] == 0 else _END if place == last else _DURING
        found.setdefault(kind, []).append(place)
    return found
