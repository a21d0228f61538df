"""Judges of claims on fitted laws, length, model size, metrics, and the theory's small examples."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastdaa.counted import counted
from fastdaa.study.curves import (
    Row,
    column_pairs,
    curve,
    finals,
    hump,
    pearson,
    split,
    sweeps,
)
from fastdaa.study.figures import correlations, tree
from fastdaa.study.figures.fitted import Fit, fits
from fastdaa.study.figures.frontier import regularised_groups, size_groups
from fastdaa.study.figures.length import KINDS, mean_r2, r2_points
from fastdaa.study.results import Results
from fastdaa.study.seed_noise import margin, standard_error
from fastdaa.study.verdicts import Finding, Seen, Verdict, conclude, each_preset, no_data
from fastdaa.study.wording import join, number, span

HALF = 0.55
"""Ratio of errors that still counts as half."""
AS_GOOD = 1.05
WEAK = 0.5
"""A correlation below this size predicts little: a quarter of the variance."""
CLOSE = -0.9
CLEARLY = 0.05


def _error_ratios(results: Results, law: str, other: str) -> list[float]:
    """Errors of ``law`` over those of ``other``, both through the origin, group by group."""

    def errors(name: str) -> list[Fit]:
        return [fit for fit in fits(results) if fit.law == name and not fit.intercept]

    # `fits.json` has every law once a group, in the order of the groups.
    pairs = zip(errors(law), errors(other), strict=False)
    return [left.rmse / right.rmse for left, right in pairs if right.rmse > 0]


def judge_half_rmse(results: Results) -> Finding:
    """The log law's error is half of that of a quadratic in KL."""
    ratios = _error_ratios(results, "log", "kl")
    if not ratios:
        return no_data("fits.json, by `fastdaa study fit`")
    middle = statistics.median(ratios)
    measured = (
        f"Ratio of errors, log law to quadratic in KL: median {number(middle)} over "
        f"{counted(len(ratios), 'fit')} ({span(ratios)})."
    )
    return Finding(measured, "reproduced" if middle <= HALF else "not reproduced")


def judge_log_better(results: Results) -> Finding:
    """The log law's error is below that of a quadratic in KL: in nine of ten fits, or in half."""
    ratios = _error_ratios(results, "log", "kl")
    if not ratios:
        return no_data("fits.json, by `fastdaa study fit`")
    better = sum(ratio < 1 for ratio in ratios)
    share = better / len(ratios)
    verdict: Verdict = (
        "reproduced" if share >= 0.9 else "partly" if share > 0.5 else "not reproduced"
    )
    return Finding(f"Smaller error in {better} of {counted(len(ratios), 'fit')}.", verdict)


def judge_d_quadratic(results: Results) -> Finding:
    """A quadratic in the distance has no larger error than the log law."""
    ratios = _error_ratios(results, "d", "log")
    if not ratios:
        return no_data("fits.json, by `fastdaa study fit`")
    middle = statistics.median(ratios)
    better = sum(ratio < 1 for ratio in ratios)
    measured = (
        f"Ratio of errors, quadratic in √KL to log law: median {number(middle)}; smaller in "
        f"{better} of {counted(len(ratios), 'fit')}."
    )
    verdict: Verdict = "reproduced" if middle <= AS_GOOD else "not reproduced"
    return Finding(measured, verdict)


@each_preset("DPO and R-DPO at the same betas", regularised_groups)
def judge_length_regularised(kinds: Mapping[str, Sequence[Row]]) -> Iterator[Seen]:
    """R-DPO's curve lies elsewhere than DPO's, and still rises and falls."""
    shape = hump(curve(kinds["R-DPO"]))
    gains = _gain_at_equal_distance(kinds["DPO"], kinds["R-DPO"])
    if shape is None or not gains:
        return
    gain = statistics.fmean(gains)
    stderr = standard_error(gains)
    moved = abs(gain) > margin(stderr, len(gains))
    spread = ""
    if stderr is not None:
        spread = f" (standard error {number(stderr)}, {counted(len(gains), 'seed')})"
    fall = "does not fall beyond noise"
    if shape.interior:
        fall = f"falls by {number(shape.fall)} beyond its best"
    yield Seen(
        f"at equal √KL, R-DPO scores {number(gain, sign=True)} against DPO{spread}"
        f"{_lengths(kinds['DPO'], kinds['R-DPO'])}; it {fall}.",
        shape.interior + moved,
        2,
    )


def _gain_at_equal_distance(plain: Sequence[Row], other: Sequence[Row]) -> list[float]:
    """Per seed: mean score of ``other`` above ``plain``'s curve, where their distances overlap."""
    gains = []
    others = split(other, "seed")
    for seed, rows in split(plain, "seed").items():
        base, tested = curve(rows), curve(others.get(seed, []))
        inside = [p for p in tested if base[0].distance <= p.distance <= base[-1].distance]
        if inside:
            x, y = [p.distance for p in base], [p.score for p in base]
            gains.append(
                statistics.fmean(p.score - float(np.interp(p.distance, x, y)) for p in inside)
            )
    return gains


def _lengths(plain: Sequence[Row], other: Sequence[Row]) -> str:
    lengths = [
        [row["length"] for row in finals(rows) if row.get("length") is not None]
        for rows in (plain, other)
    ]
    if not all(lengths):
        return ""
    before, after = map(statistics.fmean, lengths)
    return f"; answers of {number(after)} instead of {number(before)} tokens"


@each_preset("two or more model sizes at the same betas", size_groups)
def judge_larger_models(sizes: Mapping[str, Sequence[Row]]) -> Iterator[Seen]:
    """The best mean quality rises with the model's size."""
    peaks = {size: max(p.score for p in curve(rows)) for size, rows in sizes.items()}
    values = list(peaks.values())
    parts = [f"{size} {number(value, sign=True)}" for size, value in peaks.items()]
    yield Seen(f"best mean quality {join(parts)}.", values == sorted(values))


@each_preset("R² of two or more model sizes at the same betas", size_groups)
def judge_r2_by_size(sizes: Mapping[str, Sequence[Row]]) -> Iterator[Seen]:
    """The smallest model's R^2 is clearly the largest."""
    for kind, words in KINDS.items():
        if all(r2_points(rows, kind) for rows in sizes.values()):
            values = {size: mean_r2(rows, kind) for size, rows in sizes.items()}
            smallest, *rest = values.values()
            parts = [f"{size} {number(value)}" for size, value in values.items()]
            yield Seen(f"mean R² on {words} {join(parts)}.", smallest > max(rest) + CLEARLY)


def _sizes_or_all(rows: Sequence[Row]) -> dict[Any, dict[str, list[Row]]]:
    sized = size_groups(rows)
    return {
        preset: sized.get(preset) or {"all runs": group} for preset, group in sweeps(rows).items()
    }


@each_preset("R² on samples of six or more runs of a model size", _sizes_or_all)
def judge_r2_by_budget(sizes: Mapping[str, Sequence[Row]]) -> Iterator[Seen]:
    """R^2 falls as KL grows, within each model size."""
    found = {}
    for name, group in sizes.items():
        points = r2_points(group, "length_r2_samples")
        r = pearson([kl for kl, _ in points], [r2 for _, r2 in points])
        if r is not None and len(points) >= correlations.FEWEST:
            found[name] = r
    parts = [f"{name} {number(r, sign=True)}" for name, r in found.items()]
    if found:
        falls = sum(r < 0 for r in found.values())
        yield Seen(f"correlation of R² with KL: {join(parts)}.", falls, len(found))


@each_preset("{metric} on held-out pairs of six or more runs of a loss")
def judge_metric(rows: Sequence[Row], metric: str) -> Iterator[Seen]:
    """Quality is at most weakly correlated with a metric, within each loss."""
    seen = [
        cloud
        for cloud in correlations.clouds(rows)
        if cloud.metric == metric
        and cloud.r is not None
        and len(cloud.scores) >= correlations.FEWEST
    ]
    if seen:
        weak = sum(abs(cloud.r or 0.0) < WEAK for cloud in seen)
        parts = [f"{cloud.loss} {number(cloud.r, sign=True)}" for cloud in seen]
        runs = sum(len(cloud.scores) for cloud in seen)
        yield Seen(f"r = {join(parts)} ({counted(runs, 'run')}).", weak, len(seen))


@each_preset("chosen_logratio and kl_forward of six or more runs")
def judge_likelihood(rows: Sequence[Row]) -> Iterator[Seen]:
    """The log-ratio of chosen answers falls as the forward KL grows."""
    x, y = column_pairs(finals(rows), "kl_forward", "chosen_logratio")
    r = pearson(x, y)
    if r is not None and len(x) >= correlations.FEWEST:
        yield Seen(
            f"r = {number(r, sign=True)} over {counted(len(x), 'run')}; log-ratio "
            f"{number(min(y), 1, sign=True)} where it is lowest, at a forward KL of "
            f"{number(x[y.index(min(y))], 1)} nats.",
            r <= CLOSE and min(y) < 0,
        )


def judge_tree(results: Results) -> Finding:
    """Mass outside the pair grows in every setting, and no less at the smallest beta."""
    seen = []
    for pair, cells in tree.cells_of(results).items():
        grown = sum(cell["end"]["outside"] > cell["start"]["outside"] for cell in cells)
        losses = split(cells, tree.loss_name)
        compared = [
            sorted(mine, key=lambda cell: cell["beta"]) for mine in losses.values() if len(mine) > 1
        ]
        worst_low = sum(
            ranked[0]["end"]["outside"] >= ranked[-1]["end"]["outside"] for ranked in compared
        )
        settings = counted(len(cells), "setting")
        text = f"{tree.pair_title(results, pair)}: grew in {grown} of {settings}"
        if compared:
            text += f", most at the smallest beta for {worst_low} of "
            text += counted(len(compared), "loss")
        seen.append((None, Seen(f"{text}.", grown == len(cells) and worst_low == len(compared))))
    return conclude(seen, "tree.json, by `fastdaa study tree`")


def judge_null_space(results: Results) -> Finding:
    """Equal losses with all mass inside and outside the pair's responses."""
    found = results.tree.get("null_space")
    if not found:
        return no_data("tree.json, by `fastdaa study tree`")
    losses = [f"{p['name']} {number(p['loss'], 4)}" for p in found["policies"]]
    verdict: Verdict = "reproduced" if found["equal"] and found["higher"] else "not reproduced"
    return Finding(f"Loss of policies: {'; '.join(losses)}.", verdict)
