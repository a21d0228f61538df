"""One measurement in numbers: samples and scores to the columns of a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import correlation, fmean, stdev
from typing import Any, NamedTuple

from fastdaa.study.seed_noise import standard_error
from fastdaa.study.track.scoring import Sample, Scorer, ScorerError, Scores

LOGGED = (
    *("score", "score_stderr", "reward", "reward_stderr", "win_rate", "win_rate_stderr"),
    *("kl_rb", "kl_rb_stderr", "kl_k1", "kl_k1_stderr", "entropy", "length", "finished"),
    *("judge_first_rate", "judge_consistency"),
)
"""Columns that are logged as metrics, as ``track/<column>``."""

_NOISE = 1e-3
"""Nats: log-ratios of two equal models in fp32 or bf16 differ by less."""


class Verdict(NamedTuple):
    """What the scorers said of the samples."""

    scores: dict[str, Scores]
    """By column: ``reward``, ``win_rate``; those that failed are missing."""
    errors: list[str]

    @property
    def values(self) -> list[float] | None:
        """The quality of every sample: the reward, else the judge's points, else unknown."""
        return next((scores.values for scores in self.scores.values()), None)


def ask(scorers: Sequence[Scorer], samples: Sequence[Sample], *, strict: bool) -> Verdict:
    """Ask every scorer.

    ``score`` is what the first of ``scorers`` says: one that fails is not replaced by the next,
    since a column does not change its meaning in the middle of a run.

    Args:
        strict: raise where a scorer fails, instead of noting it.

    Raises:
        ScorerError: with ``strict``.
    """
    scores: dict[str, Scores] = {}
    errors = []
    for place, scorer in enumerate(scorers):
        try:
            said = scorer(samples)
        except ScorerError as error:
            if strict:
                raise
            errors.append(str(error))
            if place == 0:
                break
            continue
        scores[scorer.column] = said
    return Verdict(scores, errors)


def columns(samples: Sequence[Sample], verdict: Verdict) -> dict[str, Any]:
    """KL, quality and the rest, with standard errors over the prompts; None where unknown."""
    estimates = {
        "kl_rb": [sample.rb for sample in samples],
        "kl_k1": [sample.k1 for sample in samples],
    }
    for column, scores in verdict.scores.items():
        estimates[column] = scores.values
    row: dict[str, Any] = {}
    for name, values in estimates.items():
        row[name], row[f"{name}_stderr"] = mean_and_error(values)
    quality = (None, None) if verdict.values is None else mean_and_error(verdict.values)
    row |= {"kl": row["kl_rb"], "score": quality[0], "score_stderr": quality[1]}
    row["entropy"] = mean_and_error([sample.entropy for sample in samples])[0]
    row["length"] = fmean(sample.tokens for sample in samples)
    row["finished"] = fmean(sample.finished for sample in samples)
    row["samples"] = len(samples)
    row["length_r2_samples"] = _r2_of_length(samples)
    for scores in verdict.scores.values():
        row |= scores.columns
    return row


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard error ``std / sqrt(n)``; None where they are not finite or not defined."""
    if not values or not all(map(math.isfinite, values)):
        return None, None
    return fmean(values), standard_error(values)


def _r2_of_length(samples: Sequence[Sample]) -> float | None:
    """R^2 of ``log-ratio = a + b length``; None where the log-ratios are rounding errors."""
    ratios, lengths = [s.k1 for s in samples], [float(s.tokens) for s in samples]
    if len(samples) < 3 or not all(map(math.isfinite, ratios)):
        return None
    if stdev(ratios) < _NOISE or stdev(lengths) == 0:
        return None
    return correlation(ratios, lengths) ** 2


def logged(row: Mapping[str, Any]) -> dict[str, float]:
    """The row's numbers as metrics of the trainer."""
    return {f"track/{name}": row[name] for name in LOGGED if row.get(name) is not None}


def line(row: Mapping[str, Any]) -> str:
    """The row in one readable line."""
    cells = [_cell("score", row, "score"), _cell("KL", row, "kl_rb", " nats")]
    if row.get("win_rate") is not None and row.get("reward") is not None:
        cells.append(_cell("win-rate", row, "win_rate"))
    cells.append(f"length {row['length']:.0f} tokens")
    if row["finished"] < 1:
        cells.append(f"{row['finished']:.0%} finished")
    return f"step {row['checkpoint']}  tracked  " + "  ".join(cells)


def _cell(name: str, row: Mapping[str, Any], column: str, unit: str = "") -> str:
    value, error = row.get(column), row.get(f"{column}_stderr")
    if value is None:
        return f"{name} unknown"
    return f"{name} {value:.4g}" + (f" ± {error:.2g}" if error is not None else "") + unit
