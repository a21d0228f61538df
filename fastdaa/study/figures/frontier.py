"""The best quality for a KL budget: curves of the losses, and of the model sizes, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastdaa.study.curves import (
    Row,
    curve,
    is_length_regularised,
    is_offline,
    same_settings,
    series_name,
    split,
    sweeps,
)
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import (
    DISTANCE_LABEL,
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

TITLE = "Quality for a KL budget"
NEEDS = Needs("fastdaa study full", "two losses, two model sizes, or R-DPO")


def pictures(results: Results) -> list[Picture]:
    """By loss, by model size and with length regularisation, whatever was run."""
    found = []
    for preset, rows in sweeps(results.rows).items():
        losses = split(rows, series_name)
        if len(losses) > 1:
            found.append(_picture(results, "losses", f"{TITLE}, by loss", preset, losses))
    for preset, sizes in size_groups(results.rows).items():
        found.append(_picture(results, "sizes", f"{TITLE}, by model size", preset, sizes))
    for preset, kinds in regularised_groups(results.rows).items():
        title = f"{TITLE}, with length regularisation"
        found.append(_picture(results, "length", title, preset, kinds))
    return found


def size_groups(rows: Sequence[Row]) -> dict[Any, dict[str, list[Row]]]:
    """For each preset with several model sizes: the rows of one loss by size, where all have it.

    Only betas and seeds that every size was run with are kept; the loss is the one that most
    sizes have.
    """
    plain = [
        row
        for row in rows
        if is_offline(row) and not is_length_regularised(row) and row.get("size") is not None
    ]
    found = {}
    for preset, group in split(plain, "preset").items():
        by_loss = split(group, series_name)
        widest = max(by_loss.values(), key=lambda rows: len(split(rows, "size")))
        sizes = same_settings(split(widest, "size"))
        if len(sizes) > 1 and all(sizes.values()):
            found[preset] = {str(size): sizes[size] for size in sorted(sizes, key=_size_rank)}
    return found


def regularised_groups(rows: Sequence[Row]) -> dict[Any, dict[str, list[Row]]]:
    """For each preset: DPO and R-DPO at the same betas, seeds and size; empty without either."""
    dpo_like = [
        row for row in rows if series_name(row) in ("DPO", "R-DPO") or is_length_regularised(row)
    ]
    found = {}
    for preset, group in split(dpo_like, "preset").items():
        kinds = {
            "DPO": [row for row in group if not is_length_regularised(row)],
            "R-DPO": [row for row in group if is_length_regularised(row)],
        }
        kinds = same_settings(kinds, ("beta", "seed", "size"))
        if all(kinds.values()):
            found[preset] = kinds
    return found


def _size_rank(size: Any) -> tuple[float, str]:
    digits = "".join(letter for letter in str(size) if letter.isdigit())
    return (float(digits) if digits else 0.0, str(size))


def sentence(groups: Mapping[str, Sequence[Row]]) -> str:
    """The best point of every curve, the best first."""
    peaks = {name: max(curve(rows), key=lambda p: p.score) for name, rows in groups.items()}
    ranked = sorted(peaks, key=lambda name: -peaks[name].score)
    told = [
        f"{name} {number(peaks[name].score, sign=True)} at √KL {number(peaks[name].distance)}"
        for name in ranked
    ]
    bars = any(point.stderr is not None for rows in groups.values() for point in curve(rows))
    text = f"Best mean quality: {join(told)}."
    return f"{text} Bars: one standard error over seeds." if bars else text


def _picture(
    results: Results, name: str, title: str, preset: Any, groups: Mapping[str, Sequence[Row]]
) -> Picture:
    def draw(layout: Layout) -> Figure:
        figure, axes = panels(layout, 1, height=4.0 if layout == "wide" else 3.4)
        looks = look_of(list(groups))
        if results.in_world:
            axes[0].axhline(0, color=MUTED, linewidth=0.8)
        for series, rows in groups.items():
            _draw_curve(axes[0], series, rows, *looks[series])
        axes[0].set_xlim(left=0)
        label_axes(axes, DISTANCE_LABEL, results.score_label)
        legend_below(figure, axes, columns=legend_columns(layout, 4))
        return figure

    return Picture.of_preset(preset, f"frontier-{name}", title, sentence(groups), draw)


def _draw_curve(ax: Axes, name: str, rows: Sequence[Row], colour: str, marker: str) -> None:
    points = curve(rows)
    ax.errorbar(
        [point.distance for point in points],
        [point.score for point in points],
        yerr=[point.stderr or 0.0 for point in points],
        color=colour, marker=marker, markersize=5.5, linewidth=1.8, elinewidth=0.9, capsize=2,
        label=name,
    )  # fmt: skip
