"""What the head is to show on an H200, as data, and whether it does.

bf16, N = 8192, V = 128256, D = 4096. Times are held against the bare products in the same rounds,
memory is what is held beyond inputs and returned gradients. ``pair_loss`` selects the scored rows
itself: their copy counts as an input, as it is to the others, who are handed the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastdaa.benchmarks.reading import Result

_MIB, _GIB = 1 << 20, 1 << 30
_SELECTED_ROWS = 8192 * 4096 * 2


class Target(NamedTuple):
    """The limits of a path."""

    path: str
    products: int
    """``U`` of its floor."""
    over_floor: float
    """At most so many times the floor."""
    against_trl: float
    """At least so many times as fast as TRL's fused head."""
    extra_bytes: int
    """At most."""


TARGETS = (
    Target("score", 1, 1.08, 1.10, 64 * _MIB),
    Target("frozen", 2, 1.15, 1.45, int(1.1 * _GIB)),
    Target("single_pass", 3, 1.12, 1.30, int(2.1 * _GIB) + _SELECTED_ROWS),
    Target("recompute", 4, 1.10, 1.03, int(1.1 * _GIB)),
)
LESS_LIMIT = 300 * _MIB
"""On any path, when asked for less memory."""
SUM_LIMIT = 1e-3
"""Error of a sum of 512 token log-probs, in nats."""


class Judged(NamedTuple):
    """A path held against its target."""

    target: Target
    result: Result | None
    """The fastest right one that keeps to the memory limit, or else the fastest right one."""
    against_trl: float | None
    verdict: str
    """``met``, ``missed: ...`` or ``not measured: ...``."""

    @property
    def met(self) -> bool:
        return self.verdict == "met"


def judge(target: Target, ours: Sequence[Result], trl: Result | None) -> Judged:
    """Hold the contenders of a path against its target.

    Args:
        ours: fastdaa's contenders on the path's case.
        trl: TRL's on the same case, None where there is no row.
    """
    timed = [r for r in ours if r.ok and r.median]
    if not timed:
        said = "; ".join(f"{r.contender} {r.status}: {r.reason}" for r in ours) or "no row"
        return Judged(target, None, None, f"not measured: {said}")
    small = [r for r in timed if r.peak is not None and r.peak <= target.extra_bytes]
    best = min(small or timed, key=lambda r: r.median or 0.0)
    against = None
    if trl is not None and trl.ok and trl.median and best.median:
        against = trl.median / best.median
    missed, open_ = [], []
    for name, value, fine in (
        ("time", best.over_floor, lambda v: v <= target.over_floor),
        ("TRL", against, lambda v: v >= target.against_trl),
        ("memory", best.peak, lambda v: v <= target.extra_bytes),
    ):
        if value is None:
            open_.append(name)
        elif not fine(value):
            missed.append(name)
    if missed:
        return Judged(target, best, against, f"missed: {', '.join(missed)}")
    if open_:
        return Judged(target, best, against, f"not measured: {', '.join(open_)}")
    return Judged(target, best, against, "met")
