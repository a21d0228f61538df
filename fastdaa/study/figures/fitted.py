"""Fitted laws: the curves that other figures dot in, and how well each law fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastdaa.counted import counted
from fastdaa.study.curves import (
    distinct,
    is_length_regularised,
    is_offline,
    main_size,
    series_name,
    split,
)
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import Layout, Picture, label_axes, legend_below, look_of, panels
from fastdaa.study.fit_words import contradiction
from fastdaa.study.laws import LAWS
from fastdaa.study.results import Results
from fastdaa.study.wording import join, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Which law fits"
NEEDS = Needs("fastdaa study fit", "fits of direct alignment", file="fits.json")
LAW_NAMES = {"log": "log law", "d": "quadratic in √KL", "kl": "quadratic in KL"}
LAW_TICKS = {"log": "log\nlaw", "d": "quadratic\nin √KL", "kl": "quadratic\nin KL"}


class Fit(NamedTuple):
    """One law on one group (one seed, as a rule) of ``fits.json``."""

    preset: Any
    series: str
    law: str
    intercept: bool
    rmse: float
    d_range: tuple[float, float]
    offset: float
    coefficients: Mapping[str, float]
    contradicted: bool
    """The best checkpoint is somewhere else than its peak."""


def fits(results: Results) -> list[Fit]:
    """Fits of the plain sweeps: the main model size, no length regularisation; in the small world
    direct alignment alone, as the claims are on that."""
    return list(_read(results))


def _read(results: Results) -> Iterator[Fit]:
    plain = (row for row in results.rows if is_offline(row) or not results.in_world)
    sizes = {preset: main_size(rows) for preset, rows in split(plain, "preset").items()}
    # A fit names the columns that vary; the others have one value in the whole table.
    constant = {
        name: values[0]
        for name in ("preset", "size", "algorithm", "loss", "length_alpha")
        if len(values := distinct(results.rows, name)) == 1
    }
    for entry in results.fits.get("groups", ()):
        group = {**constant, **entry["group"]}
        preset = group.get("preset")
        size = sizes.get(preset)
        if is_length_regularised(group) or (results.in_world and not is_offline(group)):
            continue
        if size is not None and group.get("size") is not None and group["size"] != size:
            continue
        for fit in entry["fits"]:
            yield Fit(
                preset,
                series_name(group),
                fit["law"],
                bool(fit["intercept"]),
                float(fit["rmse"]),
                (entry["d_range"][0], entry["d_range"][1]),
                float(entry["offset"]),
                fit["coefficients"],
                contradiction(fit, entry.get("observed_peak")) is not None,
            )


def fitted_curves(
    results: Results, preset: Any, series: str, law: str = "log"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Distances ``[60]`` and scores ``[60]`` of a law without intercept, one pair a seed.

    Curves end where the data end. Empty where the law was fitted to another column than the one
    that the figures show.
    """
    if results.fits.get("settings", {}).get("score", "score") not in ("score", "gold"):
        return []
    found = []
    for fit in fits(results):
        if (fit.preset, fit.series, fit.law, fit.intercept) != (preset, series, law, False):
            continue
        x = np.linspace(max(fit.d_range[0], 1e-3), fit.d_range[1], 60)
        found.append((x, fit.offset + LAWS[law].value(x, **fit.coefficients)))
    return found


def fitted_label(results: Results) -> str:
    """What a legend calls the log law: it says to which checkpoints it was fitted."""
    ends = results.fits.get("settings", {}).get("final_only")
    return f"log law of {'the ends' if ends else 'all checkpoints'}"


def mean_rmse(found: Sequence[Fit]) -> dict[tuple[str, bool], float]:
    """Mean over groups by ``(law, intercept)``."""
    groups = split(({"key": (fit.law, fit.intercept), "rmse": fit.rmse} for fit in found), "key")
    return {key: sum(r["rmse"] for r in rows) / len(rows) for key, rows in groups.items()}


def pictures(results: Results) -> list[Picture]:
    """One picture a preset: errors of the laws without (left) and with (right) intercept."""
    everything = fits(results)
    presets = list(dict.fromkeys(fit.preset for fit in everything))
    found = []
    for preset in presets:
        mine = [fit for fit in everything if fit.preset == preset]
        found.append(Picture.of_preset(preset, "fits", TITLE, sentence(mine), _drawing(mine)))
    return found


def sentence(found: Sequence[Fit]) -> str:
    """Mean errors, the best law first, and the ratio that the paper halves."""
    means = mean_rmse(found)
    parts = []
    for intercept in (False, True):
        mine = sorted(
            (value, law) for (law, with_it), value in means.items() if with_it == intercept
        )
        if mine:
            told = join([f"{LAW_NAMES[law]} {number(value, 3)}" for value, law in mine])
            parts.append(f"{'with' if intercept else 'without'} intercept: {told}")
    text = f"Mean root-mean-square error, {'; '.join(parts)}."
    log = [fit for fit in found if fit.law == "log" and not fit.intercept]
    against = sum(fit.contradicted for fit in log)
    if against:
        text += (
            f" The log law's peak contradicts the best checkpoint measured in {against} of "
            f"{counted(len(log), 'fit')}."
        )
    return text


def _drawing(found: Sequence[Fit]) -> Callable[[Layout], Figure]:
    def draw(layout: Layout) -> Figure:
        kinds = [kind for kind in (False, True) if any(fit.intercept == kind for fit in found)]
        figure, axes = panels(layout, len(kinds), columns=2, height=3.1, share_y=True)
        names = list(dict.fromkeys(fit.series for fit in found))
        looks = look_of(names)
        laws = [law for law in LAW_TICKS if any(fit.law == law for fit in found)]
        for ax, kind in zip(axes, kinds, strict=True):
            for place, name in enumerate(names):
                mine = [fit for fit in found if fit.series == name and fit.intercept == kind]
                shift = 0.2 * (place - (len(names) - 1) / 2)
                ax.scatter(
                    [laws.index(fit.law) + shift for fit in mine],
                    [fit.rmse for fit in mine],
                    color=looks[name].colour, marker=looks[name].marker,
                    s=34, alpha=0.8, linewidth=0, label=name,
                )  # fmt: skip
            ax.set_xticks(range(len(laws)), [LAW_TICKS[law] for law in laws])
            ax.set_xlim(-0.6, len(laws) - 0.4)
            ax.grid(axis="x", visible=False)
            ax.set_title("with an intercept" if kind else "through the origin")
            ax.margins(y=0.1)
            ax.set_ylim(bottom=0)
        label_axes(axes, "", "RMS error of the fit\n(unit of the score)")
        legend_below(figure, axes, columns=4)
        return figure

    return draw
