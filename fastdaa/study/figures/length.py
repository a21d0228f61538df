"""How much of the implicit reward is length: R^2 by model size and KL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fastdaa.study.curves import (
    Row,
    column_pairs,
    finals,
    is_length_regularised,
    is_offline,
    split,
)
from fastdaa.study.figures.frontier import size_groups
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import (
    DISTANCE_LABEL,
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
    from matplotlib.figure import Figure

TITLE = "Length in the implicit reward"
NEEDS = Needs("fastdaa study sweep", "length_r2_samples or length_r2_pairs")
KINDS = {"length_r2_samples": "the policy's own samples", "length_r2_pairs": "held-out pairs"}
_FEW = 3
"""With fewer runs all their checkpoints are shown, not the last ones alone."""


def pictures(results: Results) -> list[Picture]:
    """One picture a preset, by model size where several were run; a panel a kind of answer."""
    found = []
    sized = size_groups(results.rows)
    plain = [row for row in results.rows if is_offline(row) and not is_length_regularised(row)]
    for preset, rows in split(plain, "preset").items():
        groups = sized.get(preset) or {"all runs": rows}
        kinds = [kind for kind in KINDS if all(r2_points(g, kind) for g in groups.values())]
        if kinds:
            if len(finals(rows)) < _FEW:
                # As runs of their own, so that each is a last checkpoint.
                single: list[Row] = [{**row, "run": place} for place, row in enumerate(rows)]
                groups = {"all checkpoints": single}
            told, drawing = sentence(groups, kinds), _drawing(groups, kinds)
            found.append(Picture.of_preset(preset, "length", TITLE, told, drawing))
    return found


def r2_points(rows: Sequence[Row], column: str) -> list[tuple[float, float]]:
    """``(KL in nats, R^2)`` of the last checkpoints, by rising KL."""
    x, y = column_pairs(finals(rows), "kl", column)
    return sorted(zip(x, y, strict=True))


def mean_r2(rows: Sequence[Row], column: str) -> float:
    """Mean ``R^2`` of the last checkpoints."""
    values = [value for _, value in r2_points(rows, column)]
    return sum(values) / len(values)


def sentence(groups: Mapping[str, Sequence[Row]], kinds: Sequence[str]) -> str:
    """Mean ``R^2`` by size."""
    parts = []
    for kind in kinds:
        told = [f"{name} {number(mean_r2(rows, kind))}" for name, rows in groups.items()]
        parts.append(f"on {KINDS[kind]}: {join(told)}")
    return f"Mean R² of log-ratio on length {'; '.join(parts)}."


def _drawing(
    groups: Mapping[str, Sequence[Row]], kinds: Sequence[str]
) -> Callable[[Layout], Figure]:
    def draw(layout: Layout) -> Figure:
        figure, axes = panels(layout, len(kinds), columns=2, height=3.2, share_y=True)
        looks = look_of(list(groups))
        for ax, kind in zip(axes, kinds, strict=True):
            for name, rows in groups.items():
                points = r2_points(rows, kind)
                colour, marker = looks[name]
                ax.scatter([max(kl, 0.0) ** 0.5 for kl, _ in points], [r2 for _, r2 in points],
                           color=colour, marker=marker, s=26, alpha=0.8, linewidth=0,
                           label=name)  # fmt: skip
            ax.set_title(f"on {KINDS[kind]}")
            ax.set_ylim(-0.03, 1.03)
            ax.set_xlim(left=min(ax.get_xlim()[0], 0.0))
        label_axes(axes, DISTANCE_LABEL, "R² of log-ratio on length (0 to 1)")
        if len(groups) > 1:
            legend_below(figure, axes, columns=legend_columns(layout, 4), title="model size")
        return figure

    return draw
