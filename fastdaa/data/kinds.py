"""What is read out of sources: pairs, examples or prompts, all in the same way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fastdaa.data.bad_rows import OnBadRow
from fastdaa.data.named_columns import NamedColumns
from fastdaa.data.readers import Place, Records
from fastdaa.data.reports import SkipReport
from fastdaa.data.scored import pair_scored
from fastdaa.data.sources import name_of, nothing_in, open_source
from fastdaa.data.tables import to_dataset
from fastdaa.validation import check_choice, check_positive

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
CheckedRow = tuple[Place, dict[str, Any], dict[str, Any]]
"""Where a row is, the row in its normal form, and fields of the source that are none of ours."""


class Check(Protocol):
    """Picks the good records of a source and brings them into their normal form."""

    def __call__(
        self,
        records: Records,
        on_bad_row: OnBadRow,
        report: SkipReport,
        *,
        source: str,
        columns: dict[str, str],
    ) -> Iterator[CheckedRow]: ...


class Rows(NamedTuple):
    """What was read out of one source."""

    places: list[Place]
    rows: list[dict[str, Any]]
    extras: list[dict[str, Any]]
    report: SkipReport


@dataclass(frozen=True)
class RecordKind:
    """Pairs, examples or prompts.

    Attributes:
        unit: what one of them is called.
        fields: all of them have, the first of them text or a list of messages.
        check: picks the good records.
        scored: scored completions become pairs.
    """

    unit: str
    fields: tuple[str, ...]
    check: Check
    scored: bool = False

    def read(
        self,
        source: str | PathLike[str] | Dataset,
        *,
        split: str | None = None,
        name: str | None = None,
        limit: int | None = None,
        on_bad_row: OnBadRow = "error",
        columns: NamedColumns | None = None,
    ) -> Rows:
        """All good rows of a source; the arguments are those of :func:`fastdaa.data.load_pairs`.

        Raises:
            DataError: a source that cannot be found or read, a bad row, or no usable row at all.
            ValueError: an unknown ``on_bad_row`` or a ``limit`` below 1.
        """
        check_choice("on_bad_row", on_bad_row, ("error", "skip"))
        check_positive("limit", limit)
        shown, report = name_of(source), SkipReport(unit=self.unit)
        records, named = open_source(source, split, name), dict[str, str]()
        if columns is not None:
            named, records = columns.read(records, shown)
        if self.scored:
            records = pair_scored(records)
        checked = self.check(records, on_bad_row, report, source=shown, columns=named)
        found = list(islice(checked, limit))
        report.kept = len(found)
        if not found:
            raise nothing_in(source, self.unit, report)
        places, rows, extras = map(list, zip(*found, strict=True))
        return Rows(places, rows, extras, report)

    def load(self, source: str | PathLike[str] | Dataset, **options: Any) -> Dataset:
        """:meth:`read` as a dataset in memory; rows that were left out are counted in the log."""
        found = self.read(source, **options)
        if found.report.skipped:
            logger.warning("%s: %s", name_of(source), found.report)
        return self.dataset(found.rows, found.extras)

    def dataset(self, rows: list[dict[str, Any]], extras: list[dict[str, Any]]) -> Dataset:
        """Rows, and what plain fields their sources had beside them, as a dataset in memory."""
        return to_dataset(rows, self.fields, extras)
