"""Is time linear in the number of tokens, and memory flat? Judged from a few measured points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_DEVIATION = 0.10
_GROWTH = 1.10
# Two fp32 tensors of the hidden states' shape: a sum of their gradient, and rows that are selected.
_HIDDEN_BYTES = 8.4


class Point(NamedTuple):
    """One number of tokens."""

    tokens: int
    seconds: float
    extra_bytes: int


class Line(NamedTuple):
    """``seconds = start + slope * tokens``, fitted to relative deviations."""

    start: float
    slope: float
    deviation: float
    """The largest, as a share of what was measured."""

    @property
    def linear(self) -> bool:
        """Every point is within 10 % of a line that rises."""
        return self.slope > 0 and self.deviation <= _DEVIATION


def fit_line(points: Sequence[Point]) -> Line:
    """The line with the least sum of squared relative deviations.

    Raises:
        ValueError: fewer than three points, which any line nearly fits.
    """
    if len({p.tokens for p in points}) < 3:
        raise ValueError(f"points: expected at least three numbers of tokens, got {len(points)}")
    import numpy as np

    seconds = np.array([p.seconds for p in points])
    tokens = np.array([float(p.tokens) for p in points])
    rows = np.stack([1 / seconds, tokens / seconds], axis=1)
    (start, slope), *_ = np.linalg.lstsq(rows, np.ones(len(points)), rcond=None)
    deviation = np.abs((start + slope * tokens) / seconds - 1).max()
    return Line(float(start), float(slope), float(deviation))


class Growth(NamedTuple):
    """Memory from a number of tokens on."""

    factor: float
    """The most over that at the first of them."""
    bytes_a_token: float
    """Between the two largest numbers of tokens: from some number on a path may hold a sum of the
    weight's size, which no further token adds to."""

    @property
    def flat(self) -> bool:
        """At most 10 % more."""
        return self.factor <= _GROWTH

    def words(self, hidden_size: int) -> str:
        """Flat, growing like a tensor of the hidden states' shape ``[N, D]``, or worse."""
        each = self.bytes_a_token / hidden_size
        if self.flat:
            return f"flat (x {self.factor:.2f})"
        alone = each <= _HIDDEN_BYTES
        kind = "not flat: [N, D] tensors" if alone else "NOT flat: more than [N, D] tensors"
        return f"{kind}, {each:.1f} D bytes a token (x {self.factor:.2f})"


def growth(points: Sequence[Point], start: int) -> Growth:
    """How extra memory grows from ``start`` tokens on.

    Raises:
        ValueError: fewer than two points from there on.
    """
    chosen = sorted(p for p in points if p.tokens >= start)
    if len(chosen) < 2:
        raise ValueError(f"points: expected two or more from {start} tokens on, got {len(chosen)}")
    before, last = chosen[-2:]
    most = max(p.extra_bytes for p in chosen)
    per_token = (last.extra_bytes - before.extra_bytes) / (last.tokens - before.tokens)
    return Growth(most / max(chosen[0].extra_bytes, 1), per_token)
