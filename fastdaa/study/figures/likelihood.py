"""Decreasing likelihoods: the log-ratio of chosen answers against the forward KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastdaa.counted import counted
from fastdaa.study.curves import Row, column_pairs, finals, pearson, series_name, split, sweeps
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
    from matplotlib.figure import Figure

TITLE = "Why chosen answers become less likely"
NEEDS = Needs("fastdaa study sweep", "chosen_logratio and kl_forward")


def pictures(results: Results) -> list[Picture]:
    """One picture, one panel a preset, with a point for each finished run."""
    groups = {}
    for preset, rows in sweeps(results.rows).items():
        kept = [
            row
            for row in finals(rows)
            if row.get("chosen_logratio") is not None and row.get("kl_forward") is not None
        ]
        if len(kept) >= 3:
            groups[preset] = kept
    if not groups:
        return []

    def draw(layout: Layout) -> Figure:
        figure, axes = panels(layout, len(groups), columns=2, height=3.4)
        for ax, (preset, rows) in zip(axes, groups.items(), strict=True):
            looks = look_of(list(split(rows, series_name)))
            far = max(row["kl_forward"] for row in rows)
            ax.plot([0, far], [0, -far], color=INK, linewidth=1, linestyle="--",
                    label="minus the forward KL")  # fmt: skip
            for name, group in split(rows, series_name).items():
                x, y = column_pairs(group, "kl_forward", "chosen_logratio")
                colour, marker = looks[name]
                ax.scatter(x, y, s=24, color=colour, marker=marker, alpha=0.75, linewidth=0,
                           label=name)  # fmt: skip
            if preset is not None:
                ax.set_title(f"preset {preset}")
        label_axes(
            axes,
            "forward KL (nats a sequence)",
            "log-ratio of chosen answers\n(mean, nats a sequence)",
        )
        legend_below(figure, axes, columns=legend_columns(layout, 4))
        return figure

    return [Picture("likelihood", TITLE, sentence(groups), draw)]


def sentence(groups: Mapping[object, Sequence[Row]]) -> str:
    """How many runs lowered the likelihood, and how closely that follows the forward KL."""
    parts = []
    for preset, rows in groups.items():
        x, y = column_pairs(rows, "kl_forward", "chosen_logratio")
        fallen = sum(value < 0 for value in y)
        above = sum(value > -kl for kl, value in zip(x, y, strict=True))
        where = "" if preset is None else f"Preset {preset}: "
        parts.append(
            f"{where}chosen answers became less likely in {fallen} of {counted(len(y), 'run')}; "
            "their mean log-ratio correlates with the forward KL at r = "
            f"{number(pearson(x, y), sign=True)} and lies above minus that KL in {above}."
        )
    text = " ".join(parts)
    return capitalised(text)
