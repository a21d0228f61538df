"""``curves.png``: how a run went, in six panels."""

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


_PANELS = (
    _Panel("Loss", "loss", (("loss", ""),)),
    _Panel("Reward margin", "chosen - rejected (nats)", (("rewards/margins", ""),), 0.0),
    _Panel("Accuracy", "share of pairs", (("rewards/accuracies", ""),), 0.5),
    _Panel(
        "Rewards: beta x log-ratio to the reference",
        "nats",
        (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
        0.0,
    ),
    _Panel(
        "KL to the reference, per completion",
        "nats",
        (("kl/sequence", "exact"), ("kl/k1", "k1 on the data")),
        0.0,
    ),
    _Panel("Throughput", "tokens / s", (("throughput/tokens_per_second", ""),)),
)
_COLOURS = ("#1f5fa8", "#c8452d")
_INCHES, _DPI = (13.0, 7.0), 120


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

    # Without pyplot no global state changes, and no display is needed.
    figure = Figure(figsize=_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        _draw_panel(axes, panel, rows)
    figure.savefig(path, dpi=_DPI)
    return True


def _draw_panel(axes: Any, panel: _Panel, rows: Rows) -> None:
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.25, linewidth=0.6)
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


def _series(rows: Rows, key: str) -> list[tuple[float, float]]:
    """Steps and values of the rows that have a finite value under ``key``."""
    return [
        (row["step"], row[key])
        for row in rows
        if "step" in row and isinstance(row.get(key), int | float)
    ]
