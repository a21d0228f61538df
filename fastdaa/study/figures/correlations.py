"""Whether accuracy or loss on held-out pairs say anything about quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastdaa.study.bootstrap import correlation, interval, resample_counts
from fastdaa.study.curves import (
    Row,
    column_pairs,
    comparable_loss,
    finals,
    pearson,
    series_name,
    split,
    sweeps,
)
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import Layout, Picture, label_axes, look_of, panels
from fastdaa.study.results import Results
from fastdaa.study.wording import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Do training metrics predict quality?"
NEEDS = Needs("fastdaa study sweep", "accuracy and loss_value of held-out pairs")
FEWEST = 6
"""Runs below which a correlation says nothing."""
METRICS = {
    "accuracy": "implicit-reward accuracy (share of held-out pairs)",
    "loss_value": "loss on held-out pairs (unit of the loss)",
}


class Cloud(NamedTuple):
    """Last checkpoints of a loss: a metric against the score."""

    metric: str
    loss: str
    metric_values: list[float]
    scores: list[float]

    @property
    def r(self) -> float | None:
        """Pearson's correlation."""
        return pearson(self.metric_values, self.scores)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of r, 95 %, by a bootstrap over the runs; None for fewer than ``FEWEST`` of them."""
        if self.r is None or len(self.scores) < FEWEST:
            return None
        counts = resample_counts(len(self.scores), 1000, seed=0)
        values = np.array(self.metric_values), np.array(self.scores)
        return interval(correlation(*values, counts), 0.95)


def clouds(rows: Sequence[Row]) -> list[Cloud]:
    """Every metric and loss with three or more runs, from the runs' last checkpoints."""
    found = []
    for metric in METRICS:
        for loss, group in split(finals(rows), series_name).items():
            x, y = column_pairs(map(comparable_loss, group), metric, "score")
            if len(x) >= 3:
                found.append(Cloud(metric, loss, x, y))
    return found


def pictures(results: Results) -> list[Picture]:
    """One picture a preset, a panel for each metric and loss."""
    found = []
    for preset, rows in sweeps(results.rows).items():
        seen = clouds(rows)
        if not seen:
            continue
        name = "correlations" if preset is None else f"correlations-{preset}"
        title = TITLE if preset is None else f"{TITLE} Preset {preset}"
        found.append(Picture(name, title, sentence(seen), _drawing(results, seen)))
    return found


def sentence(seen: Sequence[Cloud]) -> str:
    """All correlations with their intervals and numbers of runs."""
    parts = []
    for metric, word in (("accuracy", "accuracy"), ("loss_value", "loss")):
        told = [
            f"{cloud.loss} {number(cloud.r, sign=True)}{_ends(cloud)} (n = {len(cloud.scores)})"
            for cloud in seen
            if cloud.metric == metric
        ]
        if told:
            parts.append(f"with {word}: {', '.join(told)}")
    text = f"Correlation of quality {'; '.join(parts)}."
    if any(cloud.interval for cloud in seen):
        text += " Brackets: 95% bootstrap intervals over runs."
    return text


def _ends(cloud: Cloud) -> str:
    ends = cloud.interval
    if ends is None:
        return ""
    return f" [{number(ends[0], sign=True)}, {number(ends[1], sign=True)}]"


def _drawing(results: Results, seen: Sequence[Cloud]) -> Callable[[Layout], Figure]:
    def draw(layout: Layout) -> Figure:
        columns = max(len([c for c in seen if c.metric == metric]) for metric in METRICS)
        figure, axes = panels(layout, len(seen), columns=columns, height=2.7, share_y=True)
        looks = look_of(list(dict.fromkeys(cloud.loss for cloud in seen)))
        for ax, cloud in zip(axes, seen, strict=True):
            colour, marker = looks[cloud.loss]
            ax.scatter(cloud.metric_values, cloud.scores, s=22, color=colour, marker=marker,
                       alpha=0.75, linewidth=0)  # fmt: skip
            # Runs that differ in the fourth decimal have long labels.
            ax.locator_params(axis="x", nbins=5, steps=(1, 2, 5, 10))
            ax.set_title(f"{cloud.loss}, r = {number(cloud.r, sign=True)}")
            words = METRICS[cloud.metric]
            if (cloud.metric, cloud.loss) == ("loss_value", "IPO") and results.in_world:
                words = "loss on held-out pairs (times 4 beta²)"
            label_axes([ax], words.replace(" (", "\n("), results.score_label)
        return figure

    return draw
