"""Pictures of results: bars against peers, curves over the number of tokens, dots of errors.

Every picture is small and by itself, so that a page can set them side by side or, on a phone, one
below the other. Colours tell families of contenders apart, lines and markers their members.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from fastdaa.benchmarks.reading import Result, ranked
from fastdaa.benchmarks.report.palette import light, themed

_WIDTH = 4.9
_CAPTION = 68
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastdaa",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": light("ink"),
    "axes.labelcolor": light("muted"),
    "axes.edgecolor": light("grid"),
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": light("muted"),
    "ytick.color": light("muted"),
    "grid.color": light("grid"),
    "legend.frameon": False,
    "hatch.color": light("wrong"),
    "hatch.linewidth": 0.6,
}
_QUANTITIES = {"logps": "log-probs", "loss": "loss", "dh": "grad hidden", "dw": "grad head"}


class Picture(NamedTuple):
    """A drawing with a file name, a title, and what else one has to know to read it."""

    name: str
    title: str
    details: str
    figure: Figure

    def svg(self) -> str:
        """For a page: without a fixed size, in the page's colours and font, safe to repeat."""
        buffer = io.StringIO()
        with matplotlib.rc_context(_RC):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        # Several drawings in one page: their identifiers must not meet.
        prefix = re.sub(r"\W", "-", self.name)
        text = re.sub(r'\bid="', f'id="{prefix}-', text)
        text = re.sub(r'((?:xlink:)?href)="#', rf'\1="#{prefix}-', text).replace(
            "url(#", f"url(#{prefix}-"
        )
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
        text = re.sub(r'<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", text, count=1)
        text = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", text, count=1)
        text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
        text = text.replace(' xmlns="http://www.w3.org/2000/svg"', "").replace("xlink:href", "href")
        # One font for the page and its pictures; anchors keep labels where they belong.
        text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
        return themed(re.sub(r"font-family: [^;\"]*;?", "", text))

    def png(self, origin: str = "") -> bytes:
        """For files beside the page, which have no caption: with the title, the details and, in a
        last line, what was measured on."""
        buffer = io.BytesIO()
        caption = [self.title, *textwrap.wrap(f"{self.details}. {origin}".strip(), _CAPTION)]
        width, height = self.figure.get_size_inches()
        with matplotlib.rc_context(_RC):
            self.figure.set_size_inches(width, height + 0.19 * len(caption))
            words = self.figure.suptitle(
                "\n".join(caption), x=0.02, ha="left", fontsize=9, color=light("ink")
            )
            self.figure.savefig(buffer, format="png", dpi=200, facecolor=light("paper"))
            words.remove()
            self.figure.set_size_inches(width, height)
        return buffer.getvalue()


def bars(
    name: str,
    title: str,
    details: str,
    results: Iterable[Result],
    value: Callable[[Result], float | None],
    words: Callable[[float], str],
    *,
    floor: float | None = None,
) -> Picture | None:
    """One bar a contender, the least first; wrong ones come last, are hatched and say so.

    None if no contender is right. ``floor`` is a line that no right result can pass.
    """
    drawn = [(float(value(result) or 0.0), result) for result in results if result.measured]
    right = [(length, r) for length, r in drawn if length and r.ok and r.family != "floor"]
    if not right:
        return None
    right.sort(key=lambda pair: pair[0])
    pairs = right + [(length, result) for length, result in drawn if not result.ok]
    with matplotlib.rc_context(_RC):
        figure, axes = _canvas(0.45 + 0.29 * len(pairs))
        for place, (length, result) in enumerate(pairs):
            _bar(axes, place, result, length, words)
        _name_lines(axes, [result for _, result in pairs])
        axes.tick_params(length=0)
        axes.set_xlim(0, 1.36 * max(length for length, _ in pairs))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        if floor:
            axes.axvline(floor, color=light("muted"), linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"floor {words(floor)}",
                (floor, 1.0),
                xycoords=("data", "axes fraction"),
                ha="center" if floor > 0.2 * axes.get_xlim()[1] else "left",
                va="bottom",
                color=light("muted"),
                fontsize=9.5,
            )
    return Picture(name, title, details, figure)


def _name_lines(axes: Axes, shown: Sequence[Result]) -> None:
    """Contenders' names beside their lines, ours bold, the first on top."""
    axes.set_yticks(range(len(shown)), [result.contender for result in shown])
    for label, result in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_color(light("ink" if result.ok else "wrong"))
        label.set_fontweight("bold" if result.ours else "normal")
    axes.set_ylim(len(shown) - 0.5, -0.5)


def _bar(
    axes: Axes, place: int, result: Result, length: float, words: Callable[[float], str]
) -> None:
    if result.ok:
        axes.barh(place, length, height=0.68, color=light(result.family))
    else:
        axes.barh(place, length, 0.68, facecolor="none", edgecolor=light("wrong"), hatch="////")
    axes.annotate(
        words(length) if result.ok else "WRONG",
        (length, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=light("ink" if result.ok else "wrong"),
    )


def curves(
    name: str,
    title: str,
    details: str,
    results: Sequence[Result],
    value: Callable[[Result], float | None],
    words: Callable[[float], str],
    base: int = 10,
) -> Picture | None:
    """A value over N on logarithmic axes, a line a contender; wrong results are left out.

    None unless some contender has two points.
    """
    lines: dict[str, list[Result]] = {}
    floors = sorted({result.contender for result in results if result.family == "floor"})
    for result in results:
        # One floor is enough: that of the fewest products.
        if result.contender in floors[1:]:
            continue
        if result.ok and result.tokens and value(result):
            lines.setdefault(result.contender, []).append(result)
    if max((len(members) for members in lines.values()), default=0) < 2:
        return None
    with matplotlib.rc_context(_RC):
        figure, axes = _canvas(2.9 + 0.22 * ((len(lines) + 1) // 2))
        seen: dict[str, int] = {}
        for contender, members in lines.items():
            members.sort(key=lambda result: result.tokens or 0)
            family = members[0].family
            turn = seen[family] = seen.get(family, -1) + 1
            axes.plot(
                [float(result.tokens or 0) for result in members],
                [float(value(result) or 0) for result in members],
                label=contender,
                color=light(family),
                linestyle=_DASHES[turn % len(_DASHES)],
                marker=_MARKERS[turn % len(_MARKERS)],
                markersize=4,
                linewidth=2.2 if family == "fastdaa" else 1.4,
                zorder=3 if family == "fastdaa" else 2,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        tokens = sorted({result.tokens or 0 for members in lines.values() for result in members})
        axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axes.xaxis.set_minor_formatter(NullFormatter())
        _name_ticks(axes, words, base)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.set_xlabel("scored tokens N")
        figure.legend(loc="outside lower center", ncols=2, fontsize=10)
    return Picture(name, title, details, figure)


def _name_ticks(axes: Axes, words: Callable[[float], str], base: int) -> None:
    """Readable numbers on a logarithmic axis, also where it spans less than a decade."""
    low, high = axes.get_ylim()
    narrow = base == 10 and high / low < 30
    axes.yaxis.set_major_locator(LogLocator(base, subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: words(number)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())


def dots(name: str, title: str, details: str, results: Iterable[Result]) -> Picture | None:
    """Errors on a logarithmic axis, a line a contender, a mark a quantity, and the limits."""
    shown = [result for result in ranked(results) if result.errors]
    finite = [
        number for result in shown for number in result.errors.values() if 0 < number < float("inf")
    ]
    if not finite:
        return None
    least = min(finite) / 3
    with matplotlib.rc_context(_RC):
        figure, axes = _canvas(1.25 + 0.29 * len(shown))
        quantities = [q for q in _QUANTITIES if any(q in result.errors for result in shown)]
        for place, result in enumerate(shown):
            for turn, quantity in enumerate(quantities):
                if quantity not in result.errors:
                    continue
                # No error at all has no place on a logarithmic axis: it stands at its left end.
                number = min(max(result.errors[quantity], least), 10 * max(finite))
                axes.plot(
                    number,
                    place + 0.16 * (turn - (len(quantities) - 1) / 2),
                    marker=_MARKERS[turn],
                    markersize=5.5,
                    linestyle="none",
                    color=light(result.family if result.ok else "wrong"),
                    markerfacecolor=None if result.ok else "none",
                    label=_QUANTITIES[quantity] if place == 0 else None,
                )
        axes.set_xscale("log")
        _name_lines(axes, shown)
        axes.xaxis.set_major_locator(LogLocator(10, numticks=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.0e}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="both")
        axes.tick_params(length=0)
        _quantity_legend(figure, quantities)
    return Picture(name, title, details, figure)


def _quantity_legend(figure: Figure, quantities: list[str]) -> None:
    from matplotlib.lines import Line2D

    marks: list[Any] = [
        Line2D([], [], marker=_MARKERS[turn], linestyle="none", color=light("muted"), markersize=5)
        for turn in range(len(quantities))
    ]
    names = [_QUANTITIES[quantity] for quantity in quantities]
    figure.legend(marks, names, loc="outside lower center", ncols=len(names), fontsize=10)


def _canvas(height: float) -> tuple[Figure, Axes]:
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.04)
    figure = Figure(figsize=(_WIDTH, height), layout=layout)
    return figure, figure.add_subplot()
