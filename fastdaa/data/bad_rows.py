"""What becomes of rows that cannot be used: an error with their place, or a count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from fastdaa.data.errors import BadRow, DataError
from fastdaa.data.readers import Place, Records
from fastdaa.data.reports import SkipReport

OnBadRow = Literal["error", "skip"]
Row = TypeVar("Row")


def good_rows(
    records: Records, read: Callable[[Any], Row], on_bad_row: OnBadRow, report: SkipReport
) -> Iterator[tuple[Place, Row]]:
    """Place and ``read(record)`` of all records but those that ``read`` refuses.

    Args:
        read: raises :class:`BadRow` for a record that cannot be used.
        on_bad_row, report: as in :func:`handle_bad_row`.
    """
    for place, record in records:
        try:
            if isinstance(record, BadRow):
                raise record
            row = read(record)
        except BadRow as problem:
            handle_bad_row(place, problem, on_bad_row, report)
            continue
        yield place, row


def handle_bad_row(place: Place, problem: BadRow, on_bad_row: OnBadRow, report: SkipReport) -> None:
    """Counts a bad row in ``report``, or raises it as :class:`DataError` with its place."""
    if on_bad_row == "error":
        hint = "on_bad_row='skip' leaves such rows out and counts them"
        raise DataError(f"{place}: {problem} ({hint})") from problem
    report.skip(problem.reason, f"{place}: {problem}")
