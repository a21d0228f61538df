"""Judges of claims on fitted laws, length, model size, metrics, and the theory's small examples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

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
from fastdaa.study.verdicts import Finding, Verdict, no_data, share_verdict, told
from fastdaa.study.wording import count, join, number, span

HALF = 0.55
"""Ratio of errors that still counts as half."""
AS_GOOD = 1.05
WEAK = 0.5
"""A correlation below this size predicts little: a quarter of the variance."""
CLOSE = -0.9
FEWEST = 6
"""Runs below which a correlation says nothing."""
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
        f"{count(len(ratios), 'fit')} ({span(ratios)})."
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
    return Finding(f"Smaller error in {better} of {count(len(ratios), 'fit')}.", verdict)


def judge_d_quadratic(results: Results) -> Finding:
    """A quadratic in the distance has no larger error than the log law."""
    ratios = _error_ratios(results, "d", "log")
    if not ratios:
        return no_data("fits.json, by `fastdaa study fit`")
    middle = statistics.median(ratios)
    better = sum(ratio < 1 for ratio in ratios)
    measured = (
        f"Ratio of errors, quadratic in √KL to log law: median {number(middle)}; smaller in "
        f"{better} of {count(len(ratios), 'fit')}."
    )
    verdict: Verdict = "reproduced" if middle <= AS_GOOD else "not reproduced"
    return Finding(measured, verdict)


def judge_length_regularised(results: Results) -> Finding:
    """R-DPO's curve lies elsewhere than DPO's, and still rises and falls."""
    kept, moved, cases, measured = 0, 0, 0, []
    for preset, kinds in regularised_groups(results.rows).items():
        shape = hump(curve(kinds["R-DPO"]))
        gains = _gain_at_equal_distance(kinds["DPO"], kinds["R-DPO"])
        if shape is None or not gains:
            continue
        cases += 1
        gain = statistics.fmean(gains)
        stderr = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        kept += shape.interior
        moved += abs(gain) > 2 * (stderr or 0.0)
        spread = "" if stderr is None else f" (standard error {number(stderr)}, {len(gains)} seeds)"
        fall = "does not fall beyond noise"
        if shape.interior:
            fall = f"falls by {number(shape.fall)} beyond its best"
        measured.append(
            (
                preset,
                f"at equal √KL, R-DPO scores {number(gain, sign=True)} against DPO{spread}"
                f"{_lengths(kinds['DPO'], kinds['R-DPO'])}; it {fall}.",
            )
        )
    if not cases:
        return no_data("DPO and R-DPO at the same betas")
    return Finding(told(measured), share_verdict(kept + moved, 2 * cases))


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


def judge_larger_models(results: Results) -> Finding:
    """The best mean quality rises with the model's size."""
    holds, cases, measured = 0, 0, []
    for preset, sizes in size_groups(results.rows).items():
        peaks = {size: max(p.score for p in curve(rows)) for size, rows in sizes.items()}
        values = list(peaks.values())
        cases += 1
        holds += values == sorted(values)
        parts = [f"{size} {number(value, sign=True)}" for size, value in peaks.items()]
        measured.append((preset, f"best mean quality {join(parts)}."))
    if not cases:
        return no_data("two or more model sizes at the same betas")
    return Finding(told(measured), share_verdict(holds, cases))


def judge_r2_by_size(results: Results) -> Finding:
    """The smallest model's R^2 is clearly the largest."""
    holds, cases, measured = 0, 0, []
    for preset, sizes in size_groups(results.rows).items():
        for kind, words in KINDS.items():
            if not all(r2_points(rows, kind) for rows in sizes.values()):
                continue
            values = {size: mean_r2(rows, kind) for size, rows in sizes.items()}
            smallest, *rest = values.values()
            cases += 1
            holds += smallest > max(rest) + CLEARLY
            parts = [f"{size} {number(value)}" for size, value in values.items()]
            measured.append((preset, f"mean R² on {words} {join(parts)}."))
    if not cases:
        return no_data("R² of two or more model sizes at the same betas")
    return Finding(told(measured), share_verdict(holds, cases))


def judge_r2_by_budget(results: Results) -> Finding:
    """R^2 falls as KL grows, within each model size."""
    holds, cases, measured = 0, 0, []
    kind = "length_r2_samples"
    sized = size_groups(results.rows)
    for preset, rows in sweeps(results.rows).items():
        parts = []
        for name, group in (sized.get(preset) or {"all runs": rows}).items():
            points = r2_points(group, kind)
            r = pearson([kl for kl, _ in points], [r2 for _, r2 in points])
            if r is None or len(points) < FEWEST:
                continue
            cases += 1
            holds += r < 0
            parts.append(f"{name} {number(r, sign=True)}")
        if parts:
            measured.append((preset, f"correlation of R² with KL: {join(parts)}."))
    if not cases:
        return no_data("R² on samples of six or more runs of a model size")
    return Finding(told(measured), share_verdict(holds, cases))


def judge_metric(results: Results, metric: str) -> Finding:
    """Quality is at most weakly correlated with a metric, within each loss."""
    holds, cases, measured = 0, 0, []
    for preset, rows in sweeps(results.rows).items():
        seen = [
            cloud
            for cloud in correlations.clouds(rows)
            if cloud.metric == metric and cloud.r is not None and len(cloud.scores) >= FEWEST
        ]
        if not seen:
            continue
        cases += len(seen)
        holds += sum(abs(cloud.r or 0.0) < WEAK for cloud in seen)
        parts = [f"{cloud.loss} {number(cloud.r, sign=True)}" for cloud in seen]
        count = sum(len(cloud.scores) for cloud in seen)
        measured.append((preset, f"r = {join(parts)} ({count} runs)."))
    if not cases:
        return no_data(f"{metric} on held-out pairs of six or more runs of a loss")
    return Finding(told(measured), share_verdict(holds, cases))


def judge_likelihood(results: Results) -> Finding:
    """The log-ratio of chosen answers falls as the forward KL grows."""
    holds, cases, measured = 0, 0, []
    for preset, rows in sweeps(results.rows).items():
        x, y = column_pairs(finals(rows), "kl_forward", "chosen_logratio")
        r = pearson(x, y)
        if r is None or len(x) < FEWEST:
            continue
        cases += 1
        holds += r <= CLOSE and min(y) < 0
        measured.append(
            (
                preset,
                f"r = {number(r, sign=True)} over {len(x)} runs; log-ratio "
                f"{number(min(y), 1, sign=True)} where it is lowest, at a forward KL of "
                f"{number(x[y.index(min(y))], 1)} nats.",
            )
        )
    if not cases:
        return no_data("chosen_logratio and kl_forward of six or more runs")
    return Finding(told(measured), share_verdict(holds, cases))


def judge_tree(results: Results) -> Finding:
    """Mass outside the pair grows in every setting, and no less at the smallest beta."""
    holds, cases, parts = 0, 0, []
    for pair, cells in tree.cells_of(results).items():
        grown = sum(cell["end"]["outside"] > cell["start"]["outside"] for cell in cells)
        losses = split(cells, tree.loss_name)
        worst_low = 0
        for mine in losses.values():
            ranked = sorted(mine, key=lambda cell: cell["beta"])
            worst_low += ranked[0]["end"]["outside"] >= ranked[-1]["end"]["outside"]
        cases += 1
        holds += grown == len(cells) and worst_low == len(losses)
        parts.append(
            f"{tree.pair_title(results, pair)}: grew in {grown} of {len(cells)} settings, most at "
            f"the smallest beta for {worst_low} of {len(losses)} losses."
        )
    if not cases:
        return no_data("tree.json, by `fastdaa study tree`")
    text = " ".join(part[0].upper() + part[1:] for part in parts)
    return Finding(text, share_verdict(holds, cases))


def judge_null_space(results: Results) -> Finding:
    """Equal losses with all mass inside and outside the pair's responses."""
    found = results.tree.get("null_space")
    if not found:
        return no_data("tree.json, by `fastdaa study tree`")
    losses = [f"{p['name']} {number(p['loss'], 4)}" for p in found["policies"]]
    verdict: Verdict = "reproduced" if found["equal"] and found["higher"] else "not reproduced"
    return Finding(f"Loss of policies: {'; '.join(losses)}.", verdict)
