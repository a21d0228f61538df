"""What reading and tokenising kept and left out, for a person to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class SkipReport:
    """Rows that a reader kept, and rows that it left out, by reason."""

    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """For every reason, the first such row: where it is and what was expected."""

    @property
    def total_skipped(self) -> int:
        return sum(self.skipped.values())

    def skip(self, reason: str, example: str) -> None:
        """Count one row that is left out."""
        self.skipped[reason] += 1
        self.first.setdefault(reason, example)

    def __str__(self) -> str:
        line = f"{self.kept:,} pairs kept, {self.total_skipped:,} rows left out"
        return line + _reasons(self.skipped, self.first)


@dataclass
class TokenizeReport:
    """What :func:`fastdaa.data.tokenize_pairs` did."""

    pairs: int = 0
    """Pairs that came in."""
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Pairs left out, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """For every reason of a bad row, the first such row."""
    truncated: int = 0
    """Sequences of kept pairs that were cut to ``max_length``; at most two a pair."""
    identical: int = 0
    """Kept pairs whose two completions are the same tokens; they teach nothing."""
    shortened_prompts: int = 0
    """Kept pairs whose prompt, tokenised alone, is not a prefix of prompt and completion."""
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    """``p50``, ``p90``, ``p99`` and ``max`` of the tokens of the prompts."""
    completion_tokens: dict[str, int] = field(default_factory=dict)
    """The same of the completions, chosen and rejected alike."""
    total_tokens: int = 0
    """Tokens of all kept pairs, every prompt counted once."""

    def drop(self, reason: str, example: str | None = None) -> None:
        """Count one pair that is left out."""
        self.dropped[reason] += 1
        if example is not None:
            self.first.setdefault(reason, example)

    def __str__(self) -> str:
        dropped = sum(self.dropped.values())
        line = f"{self.kept:,} of {self.pairs:,} pairs kept, {dropped:,} left out"
        line += _reasons(self.dropped, self.first)
        for count, what in (
            (self.truncated, "sequences truncated"),
            (self.identical, "pairs identical after truncation"),
            (self.shortened_prompts, "prompts end where their completions' tokens diverge"),
        ):
            line += f"; {count:,} {what}" if count else ""
        spread = [
            f"{name} tokens " + ", ".join(f"{key} {value:,}" for key, value in values.items())
            for name, values in (
                ("prompt", self.prompt_tokens),
                ("completion", self.completion_tokens),
            )
        ]
        return f"{line}\n{'; '.join(spread)}; {self.total_tokens:,} in total"


def percentiles(lengths: Iterable[int]) -> dict[str, int]:
    """``p50``, ``p90``, ``p99`` and ``max``; all of them lengths that occur."""
    values = np.fromiter(lengths, dtype=np.int64)
    if not len(values):
        return {}
    p50, p90, p99 = np.percentile(values, [50, 90, 99], method="lower")
    return {"p50": int(p50), "p90": int(p90), "p99": int(p99), "max": int(values.max())}


def _reasons(counts: Counter[str], first: dict[str, str]) -> str:
    if not counts:
        return ""
    parts = [
        f"{count:,} {reason}" + (f" (first: {first[reason]})" if reason in first else "")
        for reason, count in counts.most_common()
    ]
    return ": " + ", ".join(parts)
