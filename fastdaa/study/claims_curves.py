"""Judges of claims on quality against distance, between losses and within training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from fastdaa.study.curves import (
    Hump,
    Row,
    curve,
    distance,
    finals,
    hump,
    series_name,
    split,
    sweeps,
)
from fastdaa.study.figures.beta_kl import mean_kl
from fastdaa.study.presets import PRESETS
from fastdaa.study.results import Results
from fastdaa.study.verdicts import Finding, no_data, share_verdict, told
from fastdaa.study.wording import join, number

SIMILAR = 4 / 3
"""Distances are called similar up to this ratio."""
NEAR_TIE = 1.05
WIDE = 0.8
"""A run is wide if it ends at this part of the largest distance of its loss, or beyond."""
EARLY = (0.15, 0.35)
"""Part of an epoch that counts as about a quarter."""


def _humps(rows: Sequence[Row]) -> dict[str, Hump]:
    found = {name: hump(curve(group)) for name, group in split(rows, series_name).items()}
    return {name: shape for name, shape in found.items() if shape is not None}


def judge_hump(results: Results) -> Finding:
    """An interior maximum and a fall beyond it of more than two standard errors, per loss."""
    holds, cases, measured = 0, 0, []
    for preset, rows in sweeps(results.rows).items():
        shapes = _humps(rows)
        if not shapes:
            continue
        holds += sum(shape.interior for shape in shapes.values())
        cases += len(shapes)
        parts = [
            f"{name} best {number(shape.best.score, sign=True)} at √KL "
            f"{number(shape.best.distance)}, {number(shape.farthest.score, sign=True)} at "
            f"{number(shape.farthest.distance)}"
            + ("" if shape.interior else " (no fall beyond noise)")
            for name, shape in shapes.items()
        ]
        measured.append((preset, "; ".join(parts) + "."))
    if not cases:
        return no_data("three or more betas of a loss")
    return Finding(told(measured), share_verdict(holds, cases))


def judge_ipo_kl(results: Results) -> Finding:
    """IPO's mean KL is the lowest at three quarters of the betas, and near the lowest elsewhere."""
    holds, cases, measured = 0, 0, []
    for preset, rows in sweeps(results.rows).items():
        table = {beta: kls for beta, kls in mean_kl(rows).items() if len(kls) > 1 and "IPO" in kls}
        if not table:
            continue
        others = {
            beta: min(kl for name, kl in kls.items() if name != "IPO")
            for beta, kls in table.items()
        }
        lowest = [beta for beta in table if table[beta]["IPO"] < others[beta]]
        ratios = [table[beta]["IPO"] / max(others[beta], 1e-12) for beta in table]
        cases += 1
        holds += len(lowest) >= 0.75 * len(table) and max(ratios) <= NEAR_TIE
        measured.append(
            (
                preset,
                f"IPO's KL is the lowest at {len(lowest)} of {len(table)} betas, "
                f"{number(min(ratios))} to {number(max(ratios))} times the next loss's.",
            )
        )
    if not cases:
        return no_data("IPO and another loss at the same betas")
    return Finding(told(measured), share_verdict(holds, cases))


def judge_ipo_fall(results: Results) -> Finding:
    """IPO loses less than the other losses from its best to its farthest point."""
    holds, cases, measured = 0, 0, []
    for preset, rows in sweeps(results.rows).items():
        shapes = _humps(rows)
        if "IPO" not in shapes or len(shapes) < 2:
            continue
        cases += 1
        holds += min(shapes, key=lambda name: shapes[name].fall) == "IPO"
        parts = [f"{name} {number(shape.fall)}" for name, shape in shapes.items()]
        measured.append((preset, f"loss of quality from best to farthest: {join(parts)}."))
    if not cases:
        return no_data("three or more betas of IPO and of another loss")
    return Finding(told(measured), share_verdict(holds, cases))


def judge_same_peak(results: Results) -> Finding:
    """The best points of the losses lie at similar distances."""
    holds, cases, measured = 0, 0, []
    for preset, rows in sweeps(results.rows).items():
        shapes = _humps(rows)
        if len(shapes) < 2:
            continue
        places = {name: shape.best.distance for name, shape in shapes.items()}
        ratio = max(places.values()) / max(min(places.values()), 1e-12)
        cases += 1
        holds += ratio <= SIMILAR
        parts = [
            f"{name} {number(place)}" + _at_beta(shapes[name].best.beta)
            for name, place in places.items()
        ]
        measured.append((preset, f"best at √KL {join(parts)}, ratio {number(ratio)}."))
    if not cases:
        return no_data("three or more betas of two losses")
    return Finding(told(measured), share_verdict(holds, cases))


def _at_beta(beta: float | None) -> str:
    return "" if beta is None else f" (beta {beta:g})"


class _Course(NamedTuple):
    """A wide run: when it was at its best, and what came after."""

    peak: float
    """Part of an epoch (of the training, without a known preset)."""
    early: bool
    """Best before the end."""
    kl_rose: bool
    """KL is larger at the end than at the best checkpoint."""


def judge_early_peak(results: Results) -> Finding:
    """Wide runs are at their best before the end, while KL goes on rising."""
    holds, cases, measured = 0, 0, []
    for preset, rows in sweeps(results.rows).items():
        courses = _courses(rows)
        if not courses:
            continue
        early = [course for course in courses if course.early]
        cases += 1
        holds += 3 * len(early) >= 2 * len(courses)
        rose = sum(course.kl_rose for course in early)
        measured.append(
            (
                preset,
                f"{len(early)} of {len(courses)} wide runs are at their best before the end; KL "
                f"then rose on in {rose} of them.",
            )
        )
    if not cases:
        return no_data("runs with four or more checkpoints")
    return Finding(told(measured), share_verdict(holds, cases))


def judge_quarter(results: Results) -> Finding:
    """The median wide run is at its best at about a quarter of an epoch.

    Presets whose first checkpoint comes later than that say nothing and are left out.
    """
    holds, cases, measured = 0, 0, []
    for preset, rows in sweeps(results.rows).items():
        courses = _courses(rows)
        if not courses:
            continue
        peak = statistics.median(course.peak for course in courses)
        first = min(_epochs(row) * (row.get("fraction") or 0.0) for row in rows)
        if first > EARLY[1]:
            continue
        cases += 1
        holds += EARLY[0] <= peak <= EARLY[1]
        measured.append(
            (
                preset,
                f"the median wide run is best at {peak:.0%} of an epoch (first look at "
                f"{first:.0%}).",
            )
        )
    if not cases:
        return no_data("runs with four or more checkpoints, the first within a third of an epoch")
    return Finding(told(measured), share_verdict(holds, cases))


def _epochs(row: Row) -> int:
    preset = PRESETS.get(row.get("preset") or "")
    return preset.epochs if preset else 1


def _courses(rows: Sequence[Row]) -> list[_Course]:
    found = []
    for group in split(rows, series_name).values():
        farthest = max(distance(row) for row in finals(group))
        for run in split(group, "run").values():
            course = sorted(run, key=lambda row: row["checkpoint"])
            if len(course) < 4 or distance(course[-1]) < WIDE * farthest:
                continue
            best = max(course, key=lambda row: row["score"])
            part = best.get("fraction")
            part = best["checkpoint"] / course[-1]["checkpoint"] if part is None else part
            found.append(
                _Course(part * _epochs(best), best is not course[-1], course[-1]["kl"] > best["kl"])
            )
    return found
