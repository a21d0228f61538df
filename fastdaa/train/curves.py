"""``curves.png``: how a run went, in eight panels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdaa.train.metrics_writer import CURVES_FILE, metrics_path, read_metrics

logger = logging.getLogger(__name__)
Rows = Sequence[Mapping[str, Any]]


class _Panel(NamedTuple):
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    """Key of the metric and its name in the legend."""
    level: float | None = None
    """A value that means something, drawn thinly."""
    span: tuple[float, float] | None = None
    """Ends of the axis, where all values lie between."""


_PANELS = (
    _Panel("Loss", "loss", (("loss", ""),)),
    _Panel("Reward margin", "chosen - rejected (nats)", (("rewards/margins", ""),), 0.0),
    _Panel("Accuracy", "share of pairs", (("rewards/accuracies", ""),), 0.5, (0.0, 1.0)),
    _Panel(
        "Rewards",
        "beta x log-ratio (nats)",
        (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
        0.0,
    ),
    _Panel("Exact KL to the reference", "nats / completion", (("kl/sequence", ""),), 0.0),
    # No KL: the data are not samples of the policy, and it may be negative.
    _Panel("Log-ratio of the data (k1)", "nats / completion", (("kl/k1", ""),), 0.0),
    _Panel("Gradient norm", "before clipping", (("grad_norm", ""),)),
    _Panel("Throughput", "tokens / s", (("throughput/tokens_per_second", ""),)),
)
_ROWS = 2
_COLOURS = ("#1f5fa8", "#c8452d")
_INCHES, _DPI = (16.0, 7.2), 110


class Curves(TrainerCallback):
    """Draws ``<output_dir>/curves.png`` from ``metrics.jsonl`` when training ends.

    Comes after :class:`~fastdaa.train.metrics_writer.MetricsWriter` among the callbacks. Only the
    main process draws; a picture that cannot be drawn is a warning.
    """

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir)) / CURVES_FILE
        try:
            draw_curves(read_metrics(metrics_path(args)), path)
        except Exception as error:
            # Whatever goes wrong with a picture, the weights behind it are still to be saved.
            logger.warning("%s could not be drawn: %s: %s", path, type(error).__name__, error)


def draw_curves(rows: Rows, path: str | Path) -> bool:
    """Draws logged rows as a PNG, training as lines, evaluation as dashed lines with points.

    Args:
        rows: as :func:`~fastdaa.train.metrics_writer.read_metrics` returns them.
        path: where to write.

    Returns:
        Whether there was anything to draw; if not, no file is written.
    """
    if not any(_series(rows, key) for panel in _PANELS for key, _ in panel.lines):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Without pyplot no global state changes, and no display is needed.
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14)
    figure = Figure(figsize=_INCHES, layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.subplots(_ROWS, len(_PANELS) // _ROWS)
    for axes, panel in zip(grid.flat, _PANELS, strict=True):
        _draw_panel(axes, panel, rows)
    figure.savefig(path, dpi=_DPI)
    return True


def _draw_panel(axes: Any, panel: _Panel, rows: Rows) -> None:
    axes.set_title(panel.title, fontsize=11, fontweight="bold", loc="left", pad=8)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = []
    for (key, name), colour in zip(panel.lines, _COLOURS, strict=False):
        for prefix, what in (("", "train"), ("eval_", "eval")):
            points = _series(rows, prefix + key)
            if not points:
                continue
            evaluation = bool(prefix)
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                linestyle="--" if evaluation else "-",
                marker="o" if evaluation or len(points) == 1 else None,
                markersize=4,
                linewidth=1.6,
                alpha=0.75 if evaluation else 1.0,
                label=f"{name} ({what})" if name else what,
            )
            drawn.append(what)
    if not drawn:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="0.5")
        return
    if panel.level is not None:
        axes.axhline(panel.level, color="0.6", linewidth=0.8, zorder=0)
    if len(drawn) > 1:
        axes.legend(fontsize=8, frameon=False)
    _set_axes(axes, panel)


def _set_axes(axes: Any, panel: _Panel) -> None:
    """Whole steps, numbers that need no exponent beside the axis, and fixed ends."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    low, high = axes.dataLim.intervalx
    if high - low < 1:  # of a single row
        axes.set_xlim(low - 1, high + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    numbers = ScalarFormatter(useOffset=False)
    numbers.set_powerlimits((-7, 7))
    large = max(map(abs, axes.get_ylim())) >= 1000
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}") if large else numbers)
    if panel.span is not None:
        low, high = panel.span
        margin = 0.03 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def _series(rows: Rows, key: str) -> list[tuple[float, float]]:
    """Steps and values of the rows that have a finite value under ``key``."""
    return [
        (row["step"], row[key])
        for row in rows
        if "step" in row and isinstance(row.get(key), int | float)
    ]
