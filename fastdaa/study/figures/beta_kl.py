"""How far each loss goes from the reference at each beta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import NullFormatter

from fastdaa.study.curves import Row, distinct, finals, series_name, split, sweeps
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import (
    Layout,
    Picture,
    label_axes,
    label_log_scale,
    legend_below,
    look_of,
    panels,
)
from fastdaa.study.results import Results
from fastdaa.study.wording import capitalised, join, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "KL at a given beta"
NEEDS = Needs("fastdaa study sweep", "two or more betas")


def pictures(results: Results) -> list[Picture]:
    """One picture, one panel a preset."""
    groups = {
        preset: [row for row in finals(rows) if row.get("beta")]
        for preset, rows in sweeps(results.rows).items()
    }
    groups = {preset: rows for preset, rows in groups.items() if len(distinct(rows, "beta")) > 1}
    if not groups:
        return []

    def draw(layout: Layout) -> Figure:
        figure, axes = panels(layout, len(groups), columns=2, height=3.2, share_y=True)
        for ax, (preset, rows) in zip(axes, groups.items(), strict=True):
            _draw_panel(ax, rows)
            if preset is not None:
                ax.set_title(f"preset {preset}")
        label_axes(axes, "beta (log scale)", "KL to the reference\n(nats a sequence, log scale)")
        legend_below(figure, axes, columns=3)
        return figure

    return [Picture("beta-kl", TITLE, sentence(groups), draw)]


def mean_kl(rows: Sequence[Row]) -> dict[float, dict[str, float]]:
    """Mean KL (nats) of the last checkpoints by beta and loss, for betas that all losses have."""
    losses = split(finals(rows), series_name)
    table: dict[float, dict[str, float]] = {}
    for name, group in losses.items():
        for beta, runs in split(group, "beta").items():
            if beta is not None:
                kls = [row["kl"] for row in runs]
                table.setdefault(beta, {})[name] = sum(kls) / len(kls)
    return {beta: kls for beta, kls in sorted(table.items()) if len(kls) == len(losses)}


def sentence(groups: dict[Any, list[Row]]) -> str:
    """The range of KL of each loss, from the largest beta to the smallest."""
    parts = []
    for preset, rows in groups.items():
        table = mean_kl(rows)
        if not table:
            continue
        high, low = max(table), min(table)
        told = [
            f"{name} from {number(table[high][name])} to {number(table[low][name])} nats"
            for name in table[low]
        ]
        where = "" if preset is None else f"Preset {preset}: "
        parts.append(f"{where}from beta {high:g} down to {low:g}, {join(told)}.")
    text = capitalised(" ".join(parts) or "No beta was run with every loss.")
    several = any(len(distinct(rows, "seed")) > 1 for rows in groups.values())
    return f"{text} Lines: means; shaded: all seeds." if several else text


def _draw_panel(ax: Axes, rows: Sequence[Row]) -> None:
    groups = split(rows, series_name)
    looks = look_of(list(groups))
    for name, group in groups.items():
        by_beta = split(group, "beta")
        betas = sorted(by_beta)
        kls = [[max(row["kl"], 1e-6) for row in by_beta[beta]] for beta in betas]
        means = [sum(values) / len(values) for values in kls]
        colour, marker = looks[name]
        ax.plot(betas, means, color=colour, marker=marker, linewidth=1.8, label=name)
        ax.fill_between(
            betas, [min(v) for v in kls], [max(v) for v in kls],
            color=colour, alpha=0.15, linewidth=0,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    betas = distinct(rows, "beta")
    ax.set_xticks(betas, [f"{beta:g}" for beta in betas], fontsize=8.5)
    ax.xaxis.set_minor_formatter(NullFormatter())
    label_log_scale(ax.yaxis)
