"""The demo's picture: gold score over the distance from the SFT model, and training curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, float]]
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
SFT_COLOUR = "#444444"


def draw(
    path: Path,
    *,
    sft: Mapping[str, float],
    sft_log: Rows,
    trajectories: Mapping[str, Rows],
    logs: Mapping[str, Rows],
    caption: str = "",
) -> Path:
    """Draws the picture as a PNG.

    Args:
        sft: ``gold`` of the SFT model.
        sft_log: rows with ``step`` and ``loss`` (nats a token).
        trajectories: for each policy, rows with ``kl`` (nats an answer) and ``gold`` while it
            trains; the last row is the finished policy.
        logs: for each policy, rows with ``step`` and ``accuracy`` (0 to 1) of its training batches.
        caption: a line below everything: device and versions.

    Returns:
        ``path``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), dpi=130, layout="constrained")
    axes = figure.subplot_mosaic([["gold", "sft"], ["gold", "accuracy"]], width_ratios=(1.5, 1))
    styles = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(dict.fromkeys([*trajectories, *logs]))
    }
    _draw_gold(axes["gold"], sft, trajectories, styles)
    _draw_sft(axes["sft"], sft_log)
    _draw_accuracy(axes["accuracy"], logs, styles)
    for ax in axes.values():
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    if caption:
        figure.supxlabel(caption, fontsize=8, color="#666666")
    figure.savefig(path)
    return path


def _draw_gold(
    ax: Axes,
    sft: Mapping[str, float],
    trajectories: Mapping[str, Rows],
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    for name, rows in trajectories.items():
        x = [0.0] + [math.sqrt(max(row["kl"], 0.0)) for row in rows]
        y = [sft["gold"]] + [row["gold"] for row in rows]
        style = styles[name]
        ax.plot(x, y, color=style["color"], linewidth=1.4, alpha=0.8, zorder=2)
        ax.scatter(x[1:-1], y[1:-1], color=style["color"], marker=style["marker"], s=18, zorder=3)
        ax.scatter(
            x[-1:], y[-1:], color=style["color"], marker=style["marker"], s=95,
            edgecolor="white", linewidth=1.2, label=name, zorder=4,
        )  # fmt: skip
    ax.scatter([0], [sft["gold"]], color=SFT_COLOUR, marker="*", s=150, label="SFT", zorder=5)
    ax.set_title("Gold score over the distance from the SFT model", loc="left")
    ax.set_xlabel("distance from the SFT model, √KL (√nats, per answer)")
    ax.set_ylabel("gold score of sampled answers (0 to 1)")
    ax.set_xlim(left=-0.08 * max(ax.get_xlim()[1], 0.1))
    ax.margins(y=0.12)
    if trajectories:
        note = "small: during training\nlarge: at its end"
        ax.legend(loc="best", frameon=False, title=note, title_fontsize=8)


def _draw_sft(ax: Axes, sft_log: Rows) -> None:
    steps = [row["step"] for row in sft_log]
    losses = [row["loss"] for row in sft_log]
    ax.plot(steps, losses, color=SFT_COLOUR, alpha=0.25, linewidth=0.8)
    ax.plot(steps, smooth(losses), color=SFT_COLOUR, linewidth=1.6)
    ax.set_title("Fine-tuning of the SFT model", loc="left", fontsize=10)
    ax.set_xlabel("step")
    ax.set_ylabel("loss (nats a token)")
    ax.set_ylim(bottom=0)


def _draw_accuracy(
    ax: Axes, logs: Mapping[str, Rows], styles: Mapping[str, Mapping[str, Any]]
) -> None:
    for name, rows in logs.items():
        steps = [row["step"] for row in rows]
        accuracies = [100 * row["accuracy"] for row in rows]
        colour = styles[name]["color"]
        ax.plot(steps, accuracies, color=colour, alpha=0.2, linewidth=0.8)
        ax.plot(steps, smooth(accuracies, 0.1), color=colour, linewidth=1.6)
    ax.axhline(50, color="#999999", linewidth=0.8, linestyle=":")
    ax.set_title("Alignment: pairs ranked as labelled", loc="left", fontsize=10)
    ax.set_xlabel("step")
    ax.set_ylabel("training pairs (%)")
    ax.set_ylim(35, 103)


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Moving average over the last ``share`` of the whole, fewer at the start."""
    width = max(1, round(share * len(values)))
    return [
        sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]
