"""A run's measurements: scored, compared with the earlier ones, and written down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from fastdaa.study.track.decline import Decline, Measured, decline
from fastdaa.study.track.journal import Journal
from fastdaa.study.track.scoring import Sample, Scorer
from fastdaa.study.track.settings import TrackSettings
from fastdaa.study.track.summary import ask, columns, line

logger = logging.getLogger(__name__)


class Recorded(NamedTuple):
    """One measurement."""

    row: dict[str, Any]
    """As it is in the table."""
    decline: Decline | None
    stop: bool
    """Whether it was the last of ``stop_after`` measurements in a row that have declined."""


class RunRecord:
    """All measurements of one run, on the main process.

    Args:
        scorers: the mean of the first is the ``score``.
        stop_after: see :class:`Recorded`; None for never.
        tell: gets one readable line for every measurement.
    """

    def __init__(
        self,
        journal: Journal,
        run: str,
        scorers: Sequence[Scorer],
        settings: TrackSettings,
        stop_after: int | None = None,
        tell: Callable[[str], Any] = print,
    ):
        self.journal = journal
        self._run, self._scorers, self._stop_after = run, list(scorers), stop_after
        self._tell = tell
        label = self._scorers[0].label if self._scorers else None
        self._identity = {**settings.columns(), "scorer": label}
        self.history: list[Measured] = []
        self._declined = 0

    @property
    def best(self) -> int | None:
        """The step with the highest score; the first of several."""
        best = max(self.history, key=lambda one: fmean(one.scores), default=None)
        return None if best is None else best.step

    def begin(self) -> list[dict[str, Any]]:
        """A new run, without rows: the files of an earlier one are put aside."""
        self.history, self._declined = [], 0
        self.journal.put_aside()
        return []

    def resume(self, step: float) -> list[dict[str, Any]]:
        """Forget what lies behind ``step``; the rows that are left, by checkpoint.

        Raises:
            ValueError: they were measured with other settings or another scorer.
        """
        self.journal.check_settings(self._run, self._identity)
        self.journal.forget_after(self._run, step)
        self.history = self.journal.history(self._run)
        rows = self.journal.rows(self._run)
        self._declined = 0
        for row in reversed(rows):
            if not row.get("declined"):
                break
            self._declined += 1
        return rows

    def add(
        self, samples: Sequence[Sample], step: int, more: Mapping[str, Any], *, strict: bool
    ) -> Recorded:
        """Score the samples of a step, apply the rule, and append the row.

        Args:
            more: further columns.
            strict: raise where a scorer fails; else it is a warning and the score is unknown.

        Raises:
            ScorerError: with ``strict``.
        """
        verdict = ask(self._scorers, samples, strict=strict)
        row = {
            "run": self._run,
            "checkpoint": step,
            **columns(samples, verdict),
            **more,
            **self._identity,
        }
        for error in verdict.errors:
            logger.warning("track: step %d has no score: %s", step, error)
            row["scorer_error"] = error
        found, stop = None, False
        if verdict.values is not None and row["kl"] is not None:
            now = Measured(step, verdict.values, [sample.rb for sample in samples])
            found = decline([one for one in self.history if one.step < step], now)
            self.history.append(now)
            self._declined = self._declined + 1 if found is not None else 0
            stop = self._stop_after is not None and self._declined >= self._stop_after
        row["declined"] = found is not None
        row["final"] = bool(row.get("final")) or stop
        self.journal.append(row, samples, verdict.scores, verdict.values)
        self._tell(line(row))
        if found is not None:
            logger.warning("track: over-optimisation at step %d: %s", step, found)
        return Recorded(row, found, stop)
