"""One contender on one case in two versions of this project: rounds, verdict, row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastdaa.benchmarks import wording
from fastdaa.benchmarks.compare.ratio import CONFIDENCE, Ratio, ratio_of

# Three rounds of equal versions all fall on one side in one case of four.
_LEAST_LAUNCHES, _LEAST_ROUNDS = 3, 5
_STYLES = {"slower": "bold red", "WRONG": "bold red", "faster": "green", "failed": "red"}


@dataclass
class Comparison:
    """Filled launch by launch; ``job`` is what the workers open."""

    kind: str
    job: dict[str, Any]
    base: str
    new: str
    seconds: tuple[list[list[float]], list[list[float]]] = field(default_factory=lambda: ([], []))
    """``[launch][round]`` of the base and of the new version."""
    peaks: list[int | None] = field(default_factory=lambda: [None, None])
    status: str = "ok"
    """``"ok"``, ``"wrong"``, ``"absent"`` or ``"failed"``."""
    reason: str | None = None

    @property
    def case(self) -> str:
        return str(self.job["case"])

    @property
    def contender(self) -> str:
        return str(self.job["contender"])

    @property
    def finished(self) -> bool:
        """There is something to report."""
        return self.status != "ok" or any(self.seconds[0])

    def accept(self, replies: Sequence[dict[str, Any]]) -> bool:
        """Whether both sides answered well; else keeps the reason, the base's first."""
        for name, reply in zip((self.base, self.new), replies, strict=True):
            for word in ("absent", "failed"):
                if word in reply:
                    self.status, self.reason = word, f"{name}: {reply[word]}"
                    return False
            if reply.get("status", "ok") != "ok":
                self.status, self.reason = "wrong", f"{name}: {reply.get('reason')}"
                return False
        return True

    def start_launch(self) -> None:
        """Opens the list of the next rounds."""
        for side in self.seconds:
            side.append([])

    def add_round(self, replies: Sequence[dict[str, Any]]) -> None:
        """Keeps the two measurements of a round, base first."""
        for side, reply in enumerate(replies):
            self.seconds[side][-1].append(float(reply["seconds"]))
            peaks = [peak for peak in (self.peaks[side], reply["peak_bytes"]) if peak is not None]
            self.peaks[side] = max(peaks, default=None)

    def medians(self) -> tuple[float, float]:
        """Median seconds of the base and of the new version."""
        base, new = (
            statistics.median([time for launch in side for time in launch]) for side in self.seconds
        )
        return base, new

    def ratio(self) -> Ratio | None:
        """New over base; None unless both versions are right."""
        return ratio_of(*self.seconds) if self.status == "ok" and any(self.seconds[0]) else None

    def verdict(self, threshold: float) -> str:
        """``slower``, ``faster``, ``same``, ``WRONG``, ``absent`` or ``failed``."""
        ratio = self.ratio()
        if ratio is None:
            return "WRONG" if self.status == "wrong" else self.status
        return ratio.verdict(threshold)

    def bad(self, threshold: float) -> bool:
        """Reason enough for exit code 1: a certain slowdown, a wrong result, a crash."""
        return self.verdict(threshold) in ("slower", "WRONG", "failed")

    def row(self, threshold: float) -> dict[str, Any]:
        """For the results file; kind ``"compare"``."""
        ratio = self.ratio()
        base, new = self.medians() if ratio else (None, None)
        return {
            "kind": "compare",
            "of": self.kind,
            "case": self.case,
            "case_params": self.job.get("case_params"),
            "contender": self.contender,
            "status": self.status,
            "reason": self.reason,
            "base": self.base,
            "new": self.new,
            "base_seconds": base,
            "new_seconds": new,
            "base_peak_bytes": self.peaks[0],
            "new_peak_bytes": self.peaks[1],
            "ratio": ratio and ratio.value,
            "ratio_low": ratio and ratio.low,
            "ratio_high": ratio and ratio.high,
            "confidence": CONFIDENCE,
            "verdict": self.verdict(threshold),
            "threshold": threshold,
            "rounds": [len(launch) for launch in self.seconds[0]],
            "threads": self.job.get("threads"),
            "seed": self.job.get("seed"),
        }


def cells(row: dict[str, Any]) -> list[str]:
    """A row of kind ``"compare"`` as words, in the order of ``HEADINGS``."""
    interval = "-"
    if row["ratio"] is not None:
        low, high = wording.three_digits(row["ratio_low"]), wording.three_digits(row["ratio_high"])
        interval = f"{low} - {high}"
    return [
        row["case"],
        row["contender"],
        wording.duration(row["base_seconds"]),
        wording.duration(row["new_seconds"]),
        wording.ratio(row["ratio"]),
        interval,
        f"{wording.size(row['base_peak_bytes'])} / {wording.size(row['new_peak_bytes'])}",
        row["verdict"],
    ]


HEADINGS = ("case", "contender", "base", "new", "new / base", "99 % interval", "peak", "verdict")


def print_table(results: Sequence[Comparison], threshold: float) -> None:
    """The table in the terminal, and the reasons below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not results:
        console.print("no comparison has a round yet")
        return
    lines = [cells(result.row(threshold)) for result in results]
    title = Text(f"base: {results[0].base}; new: {results[0].new}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    widths = [max(map(len, words)) for words in zip(HEADINGS, *lines, strict=True)]
    for heading, width in zip(HEADINGS, widths, strict=True):
        numbers = heading not in ("case", "contender", "verdict")
        justify: Literal["left", "right"] = "right" if numbers else "left"
        table.add_column(heading, justify=justify, min_width=width, no_wrap=True)
    for words in lines:
        table.add_row(*map(Text, words), style=_STYLES.get(words[-1]))
    # A narrow terminal may wrap lines, but no number is cut off.
    console.width = max(console.width, sum(widths) + 3 * len(widths) + 3)
    console.print(table)
    for result in results:
        if result.reason:
            console.print(
                f"{result.contender} on {result.case}: {result.reason}",
                markup=False,
                soft_wrap=True,
            )
    launches = max(len(result.seconds[0]) for result in results)
    if launches:
        console.print(
            f"Ratios above 1 are slower. 'slower' and 'faster': beyond the {100 * CONFIDENCE:.0f} %"
            f" interval and by more than {100 * threshold:g} %. Launches: {launches}.",
            highlight=False,
            soft_wrap=True,
        )
    if launches and chancy(results):
        console.print(
            f"Fewer than {_LEAST_LAUNCHES} launches of {_LEAST_ROUNDS} rounds: the interval is "
            "narrower than its name, and a verdict may be chance.",
            highlight=False,
            soft_wrap=True,
        )


def chancy(results: Sequence[Comparison]) -> bool:
    """Whether one with a ratio has too few launches or rounds for its interval to be trusted."""
    rounds = [[len(launch) for launch in result.seconds[0]] for result in results if result.ratio()]
    return any(len(some) < _LEAST_LAUNCHES or min(some) < _LEAST_ROUNDS for some in rounds)
