"""KL estimates from samples against the exact KL, and how much they scatter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FuncFormatter, NullFormatter

from fastdaa.counted import counted
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PINK,
    Layout,
    Look,
    Picture,
    label_axes,
    legend_below,
    panels,
)
from fastdaa.study.results import Results
from fastdaa.study.wording import join, number, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Estimates of the KL from samples"
NEEDS = Needs("fastdaa study estimators", file="estimators.json")
LOOKS = {
    "k1": Look(BLUE, "o"),
    "rb": Look(GREEN, "s"),
    "k3": Look(ORANGE, "^"),
    "trlx": Look(PINK, "D"),
}
LABELS = {
    "k1": "k1: log-ratio of the sample",
    "rb": "rb: exact KL at its tokens",
    "k3": "k3: 1/ratio - 1 + log-ratio",
    "trlx": "trlx: as trlX logs it, no KL",
}
UNBIASED = ("k1", "rb")
Policy = Mapping[str, Any]


def pictures(results: Results) -> list[Picture]:
    """One picture: means with the middle nine tenths of the repeats, and variances."""
    policies = sorted(results.estimators.get("policies", ()), key=lambda each: each["exact"])
    if not policies:
        return []
    samples = int(results.estimators["samples"])

    def draw(layout: Layout) -> Figure:
        figure, (means, variances) = panels(layout, 2, columns=2, height=3.3)
        for place, name in enumerate(LOOKS):
            shift = 0.14 * (place - (len(LOOKS) - 1) / 2)
            _draw_means(means, policies, name, shift)
            _draw_variances(variances, policies, name, shift)
        means.axhline(1, color=INK, linewidth=1, linestyle="--", label="exact")
        means.set_title(f"means of {samples} samples")
        variances.set_title("variance of one sample")
        label_axes([means], "exact KL (nats a sequence)", "estimate / exact KL (log scale)")
        label_axes([variances], "exact KL (nats a sequence)", "variance (nats², log scale)")
        # Another quantity than the panel beside it, so it names its own axis.
        variances.set_ylabel("variance (nats², log scale)")
        for ax in (means, variances):
            ax.set_xticks(range(len(policies)), [number(each["exact"]) for each in policies])
            ax.set_xlim(-0.6, len(policies) - 0.4)
            ax.grid(axis="x", visible=False)
            ax.set_yscale("log", base=2 if ax is means else 10)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        legend_below(figure, [means, variances], columns=3 if layout == "wide" else 1)
        return figure

    return [Picture("estimators", TITLE, sentence(policies, samples), draw)]


def sentence(policies: Sequence[Policy], samples: int) -> str:
    """Biases of the unbiased estimators in standard errors, and the ratio of their variances."""
    told = []
    for name in UNBIASED:
        biases = [each["estimators"][name]["bias_in_stderr"] for each in policies]
        known = [abs(bias) for bias in biases if bias is not None]
        if known:
            inside = sum(bias <= 3 for bias in known)
            told.append(
                f"{name} lies within three standard errors of the exact KL in {inside} of "
                f"{counted(len(known), 'policy')} (at most "
                f"{number(max(known), 1)})"
            )
    ratios = [each["variance_ratio"] for each in policies if each["variance_ratio"] is not None]
    text = f"{join(told)}."
    if ratios:
        text += f" The variance of k1 is {span(ratios, 1)} times that of rb."
    text += f" Bars: nine of ten means of {samples} samples lie within."
    spreads = [
        f"{number(each['estimators']['k3']['p05'] / each['exact'])} at {number(each['exact'])} nats"
        for each in policies
        if each["estimators"].get("k3", {}).get("p05") is not None and each["exact"] > 0
    ]
    if spreads:
        text += (
            f" One mean of {samples} samples in twenty by k3 is below this part of the exact KL: "
            f"{join(spreads)}."
        )
    return text


def _draw_means(ax: Axes, policies: Sequence[Policy], name: str, shift: float) -> None:
    x, y, low, high = [], [], [], []
    for place, policy in enumerate(policies):
        found = policy["estimators"].get(name, {})
        values = [found.get(key) for key in ("mean", "p05", "p95")]
        # On a log scale there is no place for what is not above zero.
        if policy["exact"] <= 0 or any(value is None or value <= 0 for value in values):
            continue
        mean, least, most = (value / policy["exact"] for value in values)
        x.append(place + shift)
        y.append(mean)
        low.append(max(mean - least, 0.0))
        high.append(max(most - mean, 0.0))
    if x:
        ax.errorbar(
            x, y, yerr=[low, high], color=LOOKS[name].colour, marker=LOOKS[name].marker,
            markersize=6, linestyle="none", elinewidth=1.3, capsize=3, label=LABELS[name],
        )  # fmt: skip


def _draw_variances(ax: Axes, policies: Sequence[Policy], name: str, shift: float) -> None:
    points = [
        (place + shift, policy["estimators"].get(name, {}).get("variance"))
        for place, policy in enumerate(policies)
    ]
    known = [(x, variance) for x, variance in points if variance is not None and variance > 0]
    if known:
        ax.scatter(
            [x for x, _ in known], [variance for _, variance in known],
            color=LOOKS[name].colour, marker=LOOKS[name].marker, s=40, linewidth=0,
        )  # fmt: skip
