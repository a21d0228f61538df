"""What a claim of a paper comes to, given measurements."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fastdaa.study.curves import Row, sweeps
from fastdaa.study.results import Results
from fastdaa.study.wording import capitalised

Verdict = Literal["reproduced", "partly", "not reproduced", "no data"]


class Finding(NamedTuple):
    """What was measured about a claim."""

    measured: str
    verdict: Verdict


class Claim(NamedTuple):
    """A claim of a paper and how it is judged."""

    name: str
    paper: str
    """The claim in our words, with its place in the paper."""
    judge: Callable[[Results], Finding]


def no_data(needed: str) -> Finding:
    return Finding(f"Not measured: needs {needed}.", "no data")


def share_verdict(holds: int, cases: int) -> Verdict:
    """``reproduced`` if it holds in all cases, ``partly`` in some, ``not reproduced`` in none."""
    if not cases:
        return "no data"
    if holds == cases:
        return "reproduced"
    return "partly" if holds else "not reproduced"


class Seen(NamedTuple):
    """What was measured in one preset."""

    text: str
    holds: int
    """In how many of its ``cases`` the claim holds."""
    cases: int = 1


def conclude(seen: Iterable[tuple[object, Seen]], needed: str) -> Finding:
    """The finding of all presets: ``Preset H: ... Preset M: ...``; a None is not named.

    Args:
        needed: what there would have to be, where nothing was seen.
    """
    found = list(seen)
    cases = sum(each.cases for _, each in found)
    if not cases:
        return no_data(needed)
    measured = " ".join(
        f"Preset {preset}: {each.text}" if preset is not None else capitalised(each.text)
        for preset, each in found
    )
    return Finding(measured, share_verdict(sum(each.holds for _, each in found), cases))


def each_preset(
    needed: str, groups: Callable[[Sequence[Row]], Mapping[Any, Any]] = sweeps
) -> Callable[[Callable[..., Iterator[Seen]]], Callable[..., Finding]]:
    """Makes a judge of a study's results from one that looks at a single preset.

    Args:
        needed: what there has to be in a preset for something to be seen; options of the judge
            stand in it in braces.
        groups: from the rows of a study to what is looked at in each preset.
    """

    def decorate(look: Callable[..., Iterator[Seen]]) -> Callable[..., Finding]:
        @functools.wraps(look)
        def judge(results: Results, **options: str) -> Finding:
            presets = groups(results.rows).items()
            seen = ((preset, each) for preset, rows in presets for each in look(rows, **options))
            return conclude(seen, needed.format(**options))

        return judge

    return decorate
