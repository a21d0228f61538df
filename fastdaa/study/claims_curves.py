"""Judges of claims on quality against distance, between losses and within training."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastdaa.counted import counted
from fastdaa.study.curves import (
    Hump,
    Row,
    curve,
    distance,
    falls_by_seed,
    finals,
    hump,
    series_name,
    split,
)
from fastdaa.study.figures.beta_kl import mean_kl
from fastdaa.study.fit_words import SIMILAR
from fastdaa.study.presets import PRESETS
from fastdaa.study.seed_noise import margin, standard_error
from fastdaa.study.verdicts import Seen, each_preset
from fastdaa.study.wording import join, number

NEAR_TIE = 1.05
WIDE = 0.8
"""A run is wide if it ends at this part of the largest distance of its loss, or beyond."""
EARLY = (0.15, 0.35)
"""Part of an epoch that counts as about a quarter."""


def _humps(rows: Sequence[Row]) -> dict[str, Hump]:
    found = {name: hump(curve(group)) for name, group in split(rows, series_name).items()}
    return {name: shape for name, shape in found.items() if shape is not None}


@each_preset("three or more betas of a loss")
def judge_hump(rows: Sequence[Row]) -> Iterator[Seen]:
    """An interior maximum, and a fall beyond it whose 95 % interval is above 0, per loss."""
    shapes = _humps(rows)
    parts = [
        f"{name} best {number(shape.best.score, sign=True)} at √KL "
        f"{number(shape.best.distance)}, {number(shape.farthest.score, sign=True)} at "
        f"{number(shape.farthest.distance)}" + ("" if shape.interior else " (no fall beyond noise)")
        for name, shape in shapes.items()
    ]
    if shapes:
        holds = sum(shape.interior for shape in shapes.values())
        yield Seen("; ".join(parts) + ".", holds, len(shapes))


@each_preset("IPO and another loss at the same betas")
def judge_ipo_kl(rows: Sequence[Row]) -> Iterator[Seen]:
    """IPO's mean KL is the lowest at three quarters of the betas, and near the lowest elsewhere."""
    table = {beta: kls for beta, kls in mean_kl(rows).items() if len(kls) > 1 and "IPO" in kls}
    if not table:
        return
    others = {
        beta: min(kl for name, kl in kls.items() if name != "IPO") for beta, kls in table.items()
    }
    lowest = [beta for beta in table if table[beta]["IPO"] < others[beta]]
    ratios = [table[beta]["IPO"] / max(others[beta], 1e-12) for beta in table]
    yield Seen(
        f"IPO's KL is the lowest at {len(lowest)} of {counted(len(table), 'beta')}, "
        f"{number(min(ratios))} to {number(max(ratios))} times the next loss's.",
        len(lowest) >= 0.75 * len(table) and max(ratios) <= NEAR_TIE,
    )


@each_preset("three or more betas of IPO and of another loss")
def judge_ipo_fall(rows: Sequence[Row]) -> Iterator[Seen]:
    """IPO loses less than each other loss from its best to its farthest point, in the mean and by
    more than the 95 % interval over seeds."""
    shapes = _humps(rows)
    ours = shapes.pop("IPO", None)
    if ours is None or not shapes:
        return
    names = {"IPO": ours, **shapes}
    parts = [f"{name} {number(names[name].fall)}" for name in sorted(names)]
    text = f"loss of quality from best to farthest: {join(parts)}"
    less = all(ours.fall < theirs.fall for theirs in shapes.values())
    noisy = [name for name, theirs in shapes.items() if not _falls_less(ours, theirs)]
    if less and noisy:
        text += f"; within noise of {join(noisy)}"
    yield Seen(f"{text}.", less + (less and not noisy), 2)


def _falls_less(first: Hump, second: Hump) -> bool:
    """Whether the first falls by less than the second in the same seeds, beyond noise."""
    ours, theirs = (falls_by_seed(shape.best, shape.farthest) for shape in (first, second))
    differences = [theirs[seed] - ours[seed] for seed in ours.keys() & theirs.keys()]
    if not differences:
        return first.fall < second.fall
    noise = margin(standard_error(differences), len(differences))
    return statistics.fmean(differences) > noise


@each_preset("three or more betas of two losses")
def judge_same_peak(rows: Sequence[Row]) -> Iterator[Seen]:
    """The best points of the losses lie at similar distances."""
    shapes = _humps(rows)
    if len(shapes) < 2:
        return
    places = {name: shape.best.distance for name, shape in shapes.items()}
    ratio = max(places.values()) / max(min(places.values()), 1e-12)
    parts = [
        f"{name} {number(place)}" + _at_beta(shapes[name].best.beta)
        for name, place in places.items()
    ]
    yield Seen(f"best at √KL {join(parts)}, ratio {number(ratio)}.", ratio <= SIMILAR)


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


@each_preset("runs with four or more checkpoints")
def judge_early_peak(rows: Sequence[Row]) -> Iterator[Seen]:
    """Wide runs are at their best before the end, while KL goes on rising."""
    courses = _courses(rows)
    early = [course for course in courses if course.early]
    rose = sum(course.kl_rose for course in early)
    if courses:
        yield Seen(
            f"At their best before the end: {len(early)} of {counted(len(courses), 'wide run')}; "
            f"KL then rose on in {rose} of them.",
            3 * len(early) >= 2 * len(courses),
        )


@each_preset("runs with four or more checkpoints, the first within a third of an epoch")
def judge_quarter(rows: Sequence[Row]) -> Iterator[Seen]:
    """The median wide run is at its best at about a quarter of an epoch.

    Presets whose first checkpoint comes later than that say nothing and are left out.
    """
    courses = _courses(rows)
    if not courses:
        return
    peak = statistics.median(course.peak for course in courses)
    first = min(_epochs(row) * (row.get("fraction") or 0.0) for row in rows)
    if first <= EARLY[1]:
        yield Seen(
            f"the median wide run is best at {peak:.0%} of an epoch (first look at {first:.0%}).",
            EARLY[0] <= peak <= EARLY[1],
        )


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
