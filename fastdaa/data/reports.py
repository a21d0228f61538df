"""What reading and tokenising kept and left out, for a person to read."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from fastdaa.counted import counted

MUCH = 0.1
"""A share of pairs left out from which on a report is a warning."""
_PLURAL = re.compile(r"^(pair|prompt|completion|sequence|example|row)s\b")


@dataclass
class SkipReport:
    """Rows that a reader kept, and rows that it left out, by reason."""

    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """For every reason, the first such row: where it is and what was expected."""
    unit: str = "pair"
    """What is kept."""

    @property
    def total_skipped(self) -> int:
        return sum(self.skipped.values())

    def skip(self, reason: str, example: str) -> None:
        """Count one row that is left out."""
        self.skipped[reason] += 1
        self.first.setdefault(reason, example)

    def __str__(self) -> str:
        line = f"{counted(self.kept, self.unit)} kept, "
        line += f"{counted(self.total_skipped, 'row')} left out"
        return line + _reasons(self.skipped, self.first) + _examples(self.skipped, self.first)


@dataclass
class TokenizeReport:
    """What :func:`fastdaa.data.tokenize_pairs` did; of examples, they are counted for pairs."""

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
    sources: dict[str, list[int]] = field(default_factory=dict)
    """Of a mixture: for every source, how many of its pairs came in, and how many were kept."""
    unit: str = "pair"
    """What is counted."""

    def drop(self, reason: str) -> None:
        """Count one pair that is left out."""
        self.dropped[reason] += 1

    def log(self, logger: logging.Logger, name: str) -> None:
        """Log the report of the dataset ``name``; that much was left out is a line of its own."""
        logger.info("%s: %s", name, self)
        dropped = sum(self.dropped.values())
        if self.pairs and dropped >= MUCH * self.pairs:
            reasons = [counted_reason(number, why) for why, number in self.dropped.most_common()]
            logger.warning(
                "%s: warning: %.0f%% of the %ss are left out (%s)",
                name, 100 * dropped / self.pairs, self.unit, "; ".join(reasons),
            )  # fmt: skip

    def __str__(self) -> str:
        dropped = sum(self.dropped.values())
        line = f"{self.kept:,} of {counted(self.pairs, self.unit)} kept, {dropped:,} left out"
        line += _reasons(self.dropped, self.first)
        for count, what in (
            (self.truncated, "sequences truncated"),
            (self.identical, f"{self.unit}s identical after truncation"),
            (self.shortened_prompts, "prompts end where their completions' tokens diverge"),
        ):
            line += f"; {counted_reason(count, what)}" if count else ""
        line += _examples(self.dropped, self.first)
        spread = [
            f"{name} tokens " + ", ".join(f"{key} {value:,}" for key, value in values.items())
            for name, values in (
                ("prompt", self.prompt_tokens),
                ("completion", self.completion_tokens),
            )
        ]
        for source, (came, kept) in self.sources.items():
            line += f"\n{source}: {kept:,} of {came:,} kept"
        return f"{line}\n{'; '.join(spread)}; {self.total_tokens:,} in total"


@dataclass
class SourceReport:
    """What one source gives to a mixture."""

    name: str
    weight: float
    rows: int
    """Good rows of the source."""
    train: int
    """Rows to train on; above weight 1 some are there several times."""
    held_out: int
    """Rows to evaluate on."""
    skips: SkipReport


@dataclass
class MixtureReport:
    """What :func:`fastdaa.data.load_mixture` did."""

    sources: list[SourceReport]
    unit: str = "pair"
    """What a row is."""

    def check_all_used(self) -> None:
        """Raise ``ValueError`` for a source that gives nothing to train on."""
        for source in self.sources:
            if not source.train:
                raise ValueError(
                    f"dataset_weights: expected at least one {self.unit} of {source.name} to train "
                    f"on, got none: it has {source.rows:,}, of which {source.held_out:,} are held "
                    f"out, and weight {source.weight:g}"
                )

    def __str__(self) -> str:
        line = f"{counted(sum(source.train for source in self.sources), self.unit)} "
        line += f"of {counted(len(self.sources), 'source')}"
        held_out = sum(source.held_out for source in self.sources)
        line += f", {held_out:,} held out" if held_out else ""
        for source in self.sources:
            line += f"\n{source.name}: {source.train:,} from {counted(source.rows, self.unit)}"
            line += f", weight {source.weight:g}" if source.weight != 1 else ""
            line += f", {source.held_out:,} held out" if held_out else ""
            if source.skips.skipped:
                line += f"; {counted(source.skips.total_skipped, 'row')} left out"
                line += _reasons(source.skips.skipped, source.skips.first)
                line += _examples(source.skips.skipped, source.skips.first)
        return line


def counted_reason(number: int, reason: str) -> str:
    """``1 prompt of ..``, ``2 prompts of ..``: the reason begins with a plural, or with none."""
    return f"{number:,} " + (_PLURAL.sub(r"\1", reason) if number == 1 else reason)


def percentiles(lengths: Iterable[int]) -> dict[str, int]:
    """``p50``, ``p90``, ``p99`` and ``max``; all of them lengths that occur."""
    values = np.fromiter(lengths, dtype=np.int64)
    if not len(values):
        return {}
    p50, p90, p99 = np.percentile(values, [50, 90, 99], method="lower")
    return {"p50": int(p50), "p90": int(p90), "p99": int(p99), "max": int(values.max())}


def _reasons(counts: Counter[str], first: dict[str, str]) -> str:
    """``: 2 broken JSON, 1 empty completion``; a single reason with its example."""
    if not counts:
        return ""
    line = ": " + ", ".join(counted_reason(count, reason) for reason, count in counts.most_common())
    example = first.get(next(iter(counts))) if len(counts) == 1 else None
    return line if example is None else f"{line} (first: {example})"


def _examples(counts: Counter[str], first: dict[str, str]) -> str:
    """The example of each of several reasons, a line each."""
    several = [reason for reason, _ in counts.most_common() if reason in first]
    return "".join(f"\n  {reason}: {first[reason]}" for reason in several if len(counts) > 1)
