"""One look for all figures: sizes, fonts, colours that colour-blind readers can tell apart.

A figure is drawn in light colours. As a PNG it stays so; as an SVG each colour becomes a CSS
variable, so that one drawing serves light and dark pages (:func:`to_svg`).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fastdaa.study.wording import preset_suffix
from fastdaa.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Layout = Literal["wide", "narrow"]
WIDTHS: dict[Layout, float] = {"wide": 10.4, "narrow": 3.9}
"""Inches. The page shows a narrow figure below 640 pixels, where panels stand in one column."""
PNG_DPI = 200

INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6470", "#d9dee4", "#ffffff"
# Okabe and Ito's colours, with lighter ones of the same hue for dark pages.
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = (
    "#0072b2", "#d55e00", "#009e73", "#b5598f", "#b38600", "#3f97c9",
)  # fmt: skip
# In the order of the spectrum, neighbours apart in hue and both papers apart from all.
STEPS = (
    "#4b2a8c", "#2f5fb3", "#1b8bb0", "#149a80", "#4fa33a", "#a59c12", "#d98a1a", "#c4502c",
)  # fmt: skip
STEP_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
"""For eyes that cannot tell all steps apart."""
DARK = {
    INK: "#e6e9ed",
    MUTED: "#9aa4b0",
    GRID: "#343b44",
    PAPER: "#14181d",
    BLUE: "#4db2ec",
    ORANGE: "#ff8b3d",
    GREEN: "#2fd0a2",
    PINK: "#e58fc4",
    YELLOW: "#e8c547",
    SKY: "#8fd0f5",
    STEPS[0]: "#a58ae6",
    STEPS[1]: "#7ba0ee",
    STEPS[2]: "#5cc0e6",
    STEPS[3]: "#46cfb2",
    STEPS[4]: "#86d86c",
    STEPS[5]: "#d9d64a",
    STEPS[6]: "#f5b955",
    STEPS[7]: "#f58a66",
}
SERIES_COLOURS = {"DPO": BLUE, "IPO": ORANGE, "SLiC": GREEN}
SERIES_MARKERS = {"DPO": "o", "IPO": "s", "SLiC": "^"}
_FREE_COLOURS = (PINK, YELLOW, SKY, MUTED)
_FREE_MARKERS = ("D", "v", "P", "X")
_POINTS_PER_INCH = 72
_LEGEND_SIZE = 9.0
_LEGEND_LINE = 1.7
"""Height of a line of a legend over its font size."""
_HANDLE = 4 * _LEGEND_SIZE
"""What an entry of a legend takes beside its text, in points: its line or marker, and gaps."""
DISTANCE_LABEL = "√KL to the reference (√nats)"

_SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlecolor": INK,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.w_pad": 0.07,
    "figure.constrained_layout.h_pad": 0.07,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    # Without a salt the ids of an SVG are random, and so would be the page's bytes.
    "svg.hashsalt": "fastdaa",
}


class Picture(NamedTuple):
    """One figure of the report."""

    name: str
    """Of its file, without the suffix."""
    title: str
    sentence: str
    """What is seen, computed from the data."""
    drawing: Callable[[Layout], Figure]

    @classmethod
    def of_preset(
        cls, preset: Any, name: str, title: str, sentence: str, drawing: Callable[[Layout], Figure]
    ) -> Picture:
        """One whose name and title end with a preset; None is that of tables without presets."""
        file = name if preset is None else f"{name}-{preset}"
        return cls(file, title + preset_suffix(preset), sentence, drawing)


class Look(NamedTuple):
    """How a series is drawn."""

    colour: str
    marker: str


def look_of(names: Sequence[str]) -> dict[str, Look]:
    """Fixed looks for the known losses, free ones in turn for other series."""
    looks: dict[str, Look] = {}
    free = 0
    for name in names:
        if name in SERIES_COLOURS:
            looks[name] = Look(SERIES_COLOURS[name], SERIES_MARKERS[name])
        else:
            place = free % len(_FREE_COLOURS)
            looks[name] = Look(_FREE_COLOURS[place], _FREE_MARKERS[place])
            free += 1
    return looks


def step_colours(count: int) -> list[str]:
    """``count`` colours in order."""
    if count == 1:
        return [STEPS[0]]
    last = len(STEPS) - 1
    return [STEPS[round(i * last / (count - 1))] for i in range(count)]


def panels(
    layout: Layout,
    count: int,
    *,
    columns: int = 3,
    height: float = 3.1,
    share_y: bool = False,
    share_x: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels: up to ``columns`` side by side, or one column if narrow.

    Args:
        height: of one row of panels, in inches.
    """
    across = 1 if layout == "narrow" else min(columns, count)
    down = math.ceil(count / across)
    # A single panel need not fill the whole width of a wide page.
    width = WIDTHS[layout] if across > 1 or layout == "narrow" else 0.72 * WIDTHS[layout]
    figure = Figure(figsize=(width, height * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=share_y, sharex=share_x)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    for ax in axes:
        ax.tick_params(labelbottom=True, labelleft=True)
    return figure, axes[:count]


def legend_below(
    figure: Figure, axes: Sequence[Axes], *, columns: int, title: str = "", neutral: bool = False
) -> None:
    """One legend for all panels, below them, each entry once, as wide as the figure at most.

    The figure grows by what the legend has more than two lines.

    Args:
        columns: fewer where long entries (names of runs) would not fit.
        neutral: in grey, where the same entry has another colour in each panel.
    """
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(str(label), handle)
    if not entries:
        return
    width = _POINTS_PER_INCH * figure.get_figwidth()
    labels = [_shortened(label, width - _HANDLE) for label in entries]
    fitting = _columns_that_fit(labels, columns, width)
    lines = math.ceil(len(labels) / fitting) + bool(title)
    more = max(0, lines - 2) * _LEGEND_LINE * _LEGEND_SIZE / _POINTS_PER_INCH
    figure.set_figheight(figure.get_figheight() + more)
    legend = figure.legend(
        list(entries.values()),
        labels,
        loc="outside lower center",
        ncols=fitting,
        title=title or None,
        fontsize=_LEGEND_SIZE,
        title_fontsize=_LEGEND_SIZE,
        handlelength=1.8,
        columnspacing=1.4,
    )
    if neutral:
        for entry in legend.legend_handles:
            if entry is not None:
                # What is pale among many points would be invisible alone.
                entry.set(color=MUTED, alpha=max(entry.get_alpha() or 1.0, 0.6))


def _width(label: str) -> float:
    """Of a legend's entry, in points."""
    font = FontProperties(family=_SETTINGS["font.family"], size=_LEGEND_SIZE)
    return float(text_to_path.get_text_width_height_descent(label, font, ismath=False)[0])


def _shortened(label: str, width: float) -> str:
    """The end of a label that is wider than so many points: of paths it says most."""
    full = _width(label)
    return label if full <= width else "…" + label[-int(len(label) * width / full) + 2 :]


def _columns_that_fit(labels: Sequence[str], most: int, width: float) -> int:
    """At most ``most`` columns, filled one after the other, each as wide as its longest entry."""
    widths = [_width(label) + _HANDLE for label in labels]
    for columns in range(min(most, len(labels)), 1, -1):
        if sum(map(max, np.array_split(widths, columns))) <= width:
            return columns
    return 1


def legend_columns(layout: Layout, wide: int) -> int:
    return wide if layout == "wide" else 2


def label_axes(axes: Sequence[Axes], x: str, y: str) -> None:
    """The same words for all panels: x below each, y once a row."""
    for ax in axes:
        ax.set_xlabel(x)
        place = ax.get_subplotspec()
        if place is None or place.is_first_col():
            ax.set_ylabel(y)


def label_log_scale(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 of every power of ten: one power has more than a single label."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def render(picture: Picture, layout: Layout) -> Figure:
    """Draws a picture in the shared style."""
    with rc_context(_SETTINGS):
        return picture.drawing(layout)


def save_png(figure: Figure, path: Path) -> None:
    """Writes a PNG of twice the size that the page shows, in one step."""
    with whole_file(path) as partial, rc_context(_SETTINGS):
        figure.savefig(partial, dpi=PNG_DPI, format="png")


def to_svg(figure: Figure) -> str:
    """The figure as SVG text whose colours follow the reader's light or dark setting."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = re.sub(r"<\?xml.*?\?>\s*<!DOCTYPE.*?>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    # Two decimals of a point are far below a pixel; small numbers are scales, and stay.
    text = re.sub(r"(?<![\d.])([1-9]\d*\.\d\d)\d+", r"\1", text)
    names = {light: f"--c{place}" for place, light in enumerate(DARK)}
    for light, name in names.items():
        text = re.sub(re.escape(light), f"var({name})", text, flags=re.IGNORECASE)
    light_css = ";".join(f"{name}:{light}" for light, name in names.items())
    dark_css = ";".join(f"{name}:{DARK[light]}" for light, name in names.items())
    style = (
        f"<style>:root{{{light_css}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark_css}}}}}</style>"
    )
    return re.sub(r"(<svg[^>]*>)", lambda found: found.group(1) + style, text, count=1)
