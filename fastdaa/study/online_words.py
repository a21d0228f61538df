"""What on-policy runs say about APA, PPO and AWR: sentences computed from their rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastdaa.counted import counted
from fastdaa.study.curves import Row, distance, split
from fastdaa.study.seed_noise import margin, standard_error
from fastdaa.study.wording import join, number

NAMES = {"apa": "APA", "ppo": "PPO", "awr": "AWR", "apa-whitened": "whitened APA"}
FLAT = 0.15
"""A KL that moves by less than this share of its end in the second half is called flat..."""
FLAT_NATS = 0.1
"""...or by less than this."""
COLLAPSED = 0.1
"""A policy with less than this share of the reference's entropy has collapsed."""
_GRID, _HALF = 0.25, 0.5


class Setting(NamedTuple):
    """One strength of one method, its runs in all seeds."""

    strength: float
    runs: tuple[tuple[Row, ...], ...]
    """Rows of each run, in order."""

    @property
    def ends(self) -> list[Row]:
        """The last row of each run."""
        return [run[-1] for run in self.runs]

    def mean(self, column: str) -> float:
        """Of the ends."""
        return statistics.fmean(row[column] for row in self.ends)

    @property
    def moved(self) -> float:
        """Change of KL over the second half of the run, nats, mean of the seeds.

        Along a straight line through the checkpoints of that half: single ones are noisy.
        """
        changes = []
        for run in self.runs:
            late = [row for row in run if row["fraction"] >= _HALF]
            if len(late) < 2:
                changes.append(0.0)
                continue
            line = statistics.linear_regression(
                [row["fraction"] for row in late], [row["kl"] for row in late]
            )
            changes.append((1 - _HALF) * line.slope)
        return statistics.fmean(changes)

    @property
    def flat(self) -> bool:
        """Whether KL hardly moved in the second half."""
        return abs(self.moved) <= max(FLAT * self.mean("kl"), FLAT_NATS)

    @property
    def collapsed(self) -> int:
        """In how many seeds the entropy is gone at the end."""
        return sum(row["entropy"] < COLLAPSED * row["ref_entropy"] for row in self.ends)


def settings_of(rows: Iterable[Row]) -> dict[str, list[Setting]]:
    """By method (``apa``, ``ppo``, ``awr``, ``apa-whitened``), ascending strengths."""
    found: dict[str, list[Setting]] = {}
    trained = [row for row in rows if row.get("series") in NAMES]
    for series, group in split(trained, "series").items():
        found[series] = [
            Setting(
                strength,
                tuple(
                    tuple(sorted(run, key=lambda row: row["checkpoint"]))
                    for run in split(same, "run").values()
                ),
            )
            for strength, same in split(group, "beta").items()
        ]
    return found


def sentences(rows: Sequence[Row]) -> list[str]:
    """One paragraph a method, and one about who wins; only about what was run."""
    found = settings_of(rows)
    told = []
    exact: dict[float, list[float]] = {}
    for row in rows:
        if row.get("series") == "apa_fixed_point":
            exact.setdefault(row["beta"], []).append(row["kl"])
    if "apa" in found:
        told.append(_apa(found["apa"], exact))
    if "apa-whitened" in found:
        told.append(f"Whitened APA: {_plateau(found['apa-whitened'], 'lambda')}.")
    if "awr" in found:
        told.append(f"AWR: {_plateau(found['awr'], 'lambda')}.")
    if "ppo" in found:
        told += _ppo(found["ppo"])
    told += winners(found)
    return told


def _plateau(settings: Sequence[Setting], name: str) -> str:
    """KL at the end and how it moved, over all strengths."""
    ends = ", ".join(f"{number(s.mean('kl'))} at {name} {s.strength:g}" for s in settings)
    flat = sum(setting.flat for setting in settings)
    rising = [s for s in settings if not s.flat and s.moved > 0]
    falling = [s for s in settings if not s.flat and s.moved < 0]
    text = (
        f"KL ends at {ends}; it is flat in the second half of the run (within {FLAT:.0%} or "
        f"{FLAT_NATS} nats) in {flat} of {counted(len(settings), 'setting')}"
    )
    for moving, verb in ((rising, "still rises"), (falling, "falls back")):
        if moving:
            text += f", and {verb} at " + join(
                [f"{name} {s.strength:g} (by {number(abs(s.moved))} nats)" for s in moving]
            )
    gone = [s for s in settings if s.collapsed]
    if gone:
        text += f"; entropy is below {COLLAPSED:.0%} of the reference's at " + join(
            [
                f"{name} {s.strength:g} ({s.collapsed} of {counted(len(s.runs), 'seed')})"
                for s in gone
            ]
        )
    return text


def _apa(settings: Sequence[Setting], exact: Mapping[float, Sequence[float]]) -> str:
    text = f"APA: {_plateau(settings, 'lambda')}"
    known = [s for s in settings if s.strength in exact]
    if known:
        text += "; the exact fixed points have " + ", ".join(
            number(statistics.fmean(exact[s.strength])) for s in known
        )
    return text + "."


def _ppo(settings: Sequence[Setting]) -> list[str]:
    told = []
    free = [setting for setting in settings if setting.strength == 0]
    held = [setting for setting in settings if setting.strength > 0]
    for setting in free:
        peaks = [max(run, key=lambda row: row["gold"]) for run in setting.runs]
        gone = setting.mean("gold") < 0 or setting.collapsed > 0
        peak, when = (
            statistics.fmean(row[column] for row in peaks) for column in ("gold", "iteration")
        )
        told.append(
            f"PPO without a KL term {'collapses' if gone else 'does not collapse'}: gold is best "
            f"with {number(peak, sign=True)} at iteration {when:.0f} and ends at "
            f"{number(setting.mean('gold'), sign=True)} with KL {number(setting.mean('kl'))}, "
            f"while the proxy ends at {number(setting.mean('proxy'), sign=True)}; entropy is below "
            f"{COLLAPSED:.0%} of the reference's in {setting.collapsed} of "
            f"{counted(len(setting.runs), 'seed')}."
        )
    if held:
        told.append(f"PPO with a fixed KL coefficient: {_plateau(held, 'coefficient')}.")
    return told


def winners(found: Mapping[str, Sequence[Setting]]) -> list[str]:
    """Best settings, and a comparison at equal distance, seed by seed."""
    main = {name: found[name] for name in ("apa", "ppo", "awr") if name in found}
    if len(main) < 2:
        return []
    best = {name: max(group, key=lambda s: s.mean("gold")) for name, group in main.items()}
    parts = [
        f"{NAMES[name]} {number(setting.mean('gold'), sign=True)} at √KL "
        f"{number(statistics.fmean(map(distance, setting.ends)))}"
        for name, setting in sorted(best.items(), key=lambda item: -item[1].mean("gold"))
    ]
    told = ["Best final gold of any setting, mean of the seeds: " + ", ".join(parts) + "."]
    for other in ("ppo", "awr"):
        if "apa" in main and other in main:
            told.append(_duel(main["apa"], main[other], NAMES[other]))
    return told


def _duel(apa: Sequence[Setting], other: Sequence[Setting], name: str) -> str:
    """APA's frontier against that of another method, with intervals over seeds."""
    places = compare(apa, other)
    if not places:
        return f"APA and {name}: no common distance, or only one seed; not compared."
    ahead, behind = (
        sum(sign * p.difference > margin(p.stderr, p.seeds) for p in places) for sign in (1, -1)
    )
    middle = statistics.fmean(place.difference for place in places)
    return (
        f"Best gold of any checkpoint within √KL {number(places[0].distance)} to "
        f"{number(places[-1].distance)}: APA's less {name}'s is {number(middle, sign=True)} on "
        f"average. Ahead by more than the 95 % interval over {counted(places[0].seeds, 'seed')}, "
        f"of {counted(len(places), 'distance')}: APA at {ahead}, {name} at {behind}."
    )


class Place(NamedTuple):
    """Two methods at one distance."""

    distance: float
    difference: float
    """Of the best gold within that distance, first less second, mean of the seeds."""
    stderr: float | None
    seeds: int


def compare(first: Sequence[Setting], second: Sequence[Setting]) -> list[Place]:
    """Two frontiers, seed by seed: the best gold of any checkpoint within a distance.

    Distances are a quarter apart, up to where both methods went in all seeds. Stopping early is
    allowed, so that a setting that goes too far does not count against its method.
    """
    frontiers = [_by_seed(settings) for settings in (first, second)]
    seeds = sorted(frontiers[0].keys() & frontiers[1].keys())
    if len(seeds) < 2:
        return []
    reach = min(max(map(distance, found[seed])) for found in frontiers for seed in seeds)
    places = []
    for step in range(1, int(reach / _GRID) + 1):
        differences = []
        for seed in seeds:
            ours, theirs = (best_within(found[seed], step * _GRID) for found in frontiers)
            differences.append(ours - theirs)
        mean, error = statistics.fmean(differences), standard_error(differences)
        places.append(Place(step * _GRID, mean, error, len(differences)))
    return places


def best_within(rows: Iterable[Row], reach: float) -> float:
    """The best gold of rows within a distance; 0, the reference's, if there is none better."""
    return max([0.0, *(row["gold"] for row in rows if distance(row) <= reach)])


def _by_seed(settings: Sequence[Setting]) -> dict[Any, list[Row]]:
    return split((row for s in settings for run in s.runs for row in run), "seed")
