"""APA, PPO and AWR: gold reward against distance, and how the distance grows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.ticker import MaxNLocator

from fastdaa.study.curves import Row, distance, split
from fastdaa.study.figures.end_labels import EndLabel, label_ends
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import (
    BLUE,
    DISTANCE_LABEL,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    SKY,
    Layout,
    Picture,
    label_log_scale,
    legend_below,
    panels,
)
from fastdaa.study.online_words import NAMES, Setting, best_within, sentences, settings_of
from fastdaa.study.results import Results
from fastdaa.study.wording import preset_suffix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "APA, PPO and AWR: quality against distance"
NEEDS = Needs("fastdaa study online", "runs of APA, PPO or AWR in the small world")
_LOOKS = {"apa": (BLUE, "o"), "ppo": (ORANGE, "s"), "awr": (GREEN, "^"), "apa-whitened": (SKY, "D")}
_EXACT = {
    "apa_fixed_point": ("exact fixed points of APA", (0, (1, 1.4))),
    "kl_optimum": ("exact optima with a KL penalty", (0, (5, 2))),
}
_POINTS = 60


def pictures(results: Results) -> list[Picture]:
    """One picture a preset and model size."""
    found = []
    for preset, rows in split(results.rows, "preset").items():
        worlds = {size: same for size, same in split(rows, "size").items() if settings_of(same)}
        for size, same in worlds.items():
            suffix = f"-{size}" if len(worlds) > 1 else ""
            title = TITLE + preset_suffix(preset) + (f", {size}" if suffix else "")
            found.append(picture(same, f"online-{preset}{suffix}", title))
    return found


def picture(rows: Sequence[Row], name: str = "online", title: str = TITLE) -> Picture:
    """Two panels: the frontier of each method, and KL over the iterations of each setting.

    Args:
        rows: of one world, i.e. of one preset and model size.
        name, title: of the picture.

    Raises:
        ValueError: no on-policy run among the rows.
    """
    found = settings_of(rows)
    if not found:
        raise ValueError("rows: expected on-policy runs (apa, ppo or awr), got none")

    def draw(layout: Layout) -> Figure:
        figure, axes = panels(layout, 2, columns=2, height=4.0)
        _draw_frontiers(axes[0], rows, found)
        ends = _draw_growth(axes[1], found)
        legend_below(figure, axes, columns=4 if layout == "wide" else 1)
        label_ends(figure, axes[1], ends)
        return figure

    return Picture(name, title, " ".join(sentences(rows)), draw)


def _draw_frontiers(ax: Axes, rows: Sequence[Row], found: dict[str, list[Setting]]) -> None:
    lowest = 0.0
    for series, settings in found.items():
        colour, marker = _LOOKS[series]
        everything = [row for s in settings for run in s.runs for row in run]
        ax.scatter(
            [distance(row) for row in everything], [row["gold"] for row in everything],
            s=7, color=colour, alpha=0.25, linewidth=0,
        )  # fmt: skip
        ax.scatter(
            [statistics.fmean(map(distance, s.ends)) for s in settings],
            [s.mean("gold") for s in settings],
            s=44, color=colour, marker=marker, edgecolor=INK, linewidth=0.6, zorder=4,
            label=f"{NAMES[series]}, end of a setting",
        )  # fmt: skip
        if series in ("apa", "ppo", "awr"):
            ax.plot(*_frontier(everything), color=colour, linewidth=1.6, zorder=3,
                    label=f"{NAMES[series]}, best within a distance")  # fmt: skip
        lowest = min(lowest, *(row["gold"] for row in everything))
    for algorithm, (label, dashes) in _EXACT.items():
        exact = split((row for row in rows if row.get("series") == algorithm), "beta")
        if exact:
            points = sorted(
                (
                    statistics.fmean(map(distance, same)),
                    statistics.fmean(row["gold"] for row in same),
                )
                for same in exact.values()
            )
            ax.plot(*zip(*points, strict=True), color=MUTED, linewidth=1.4, linestyle=dashes,
                    label=label)  # fmt: skip
    ax.axhline(0, color=MUTED, linewidth=0.8)
    # A collapse would squeeze everything else into a line.
    ax.set_ylim(bottom=max(lowest, -2.0) - 0.1)
    ax.set_xlim(left=0)
    ax.set_xlabel(DISTANCE_LABEL)
    ax.set_ylabel("gold reward\n(reference std. deviations)")
    ax.set_title("Gold reward" + (" (cut off at -2)" if lowest < -2 else ""))


def _frontier(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Best gold within a distance, mean of the seeds, as far as all seeds went."""
    seeds = split(rows, "seed").values()
    reach = min(max(map(distance, seed)) for seed in seeds)
    x = [reach * place / _POINTS for place in range(_POINTS + 1)]
    return x, [statistics.fmean(best_within(seed, place) for seed in seeds) for place in x]


def _draw_growth(ax: Axes, found: dict[str, list[Setting]]) -> list[EndLabel]:
    """KL over iterations; the strengths, to be written at the ends."""
    ends = []
    for series, settings in found.items():
        colour, marker = _LOOKS[series]
        for setting in settings:
            columns = list(zip(*setting.runs, strict=True))
            ax.plot(
                [rows[0]["iteration"] for rows in columns],
                [statistics.fmean(row["kl"] for row in rows) for rows in columns],
                color=colour, marker=marker, markersize=3, linewidth=1.2, alpha=0.85,
            )  # fmt: skip
            last = columns[-1][0]["iteration"]
            ends.append(EndLabel(f"{setting.strength:g}", last, setting.mean("kl"), colour))
    ax.set_yscale("log")
    label_log_scale(ax.yaxis)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("iteration")
    ax.set_ylabel("KL to the reference (nats)")
    ax.set_title("KL by setting (λ, or PPO's coefficient)")
    return ends
