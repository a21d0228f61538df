"""What a claim of a paper comes to, given measurements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from fastdaa.study.results import Results

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


def told(measured: list[tuple[object, str]]) -> str:
    """Sentences by preset: ``Preset H: ...; preset M: ...``."""
    return " ".join(
        f"Preset {preset}: {text}" if preset is not None else text[0].upper() + text[1:]
        for preset, text in measured
    )
