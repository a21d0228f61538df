"""How the records of a source are read: as they are, or out of other columns.

This is decided once a source, on its first record that tells it, and said in the log; every other
record has to fit. :mod:`fastdaa.data.known_formats` lists what is recognised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from fastdaa.data.errors import BadRow, DataError
from fastdaa.data.readers import Place, Records

logger = logging.getLogger(__name__)
_MOST_ASKED = 100
_MOST_COMPARED = 20
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """How records of a source are read.

    Attributes:
        meaning: for the log; empty for our own fields.
        columns: from our fields to the columns that are read for them, where names differ.
        convert: gives a record in our fields, or raises :class:`BadRow`.
        tentative: one record alone does not tell it; the first that says otherwise does.
    """

    meaning: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[Record], Record] = lambda record: record
    tentative: bool = False

    def reader(
        self, normalise: Callable[[Any], Any], columns: Mapping[str, str]
    ) -> Callable[[Any], tuple[Any, Any]]:
        """From a record to the same in our fields, and to what ``normalise`` makes of that.

        Args:
            normalise: raises :class:`BadRow`, as the result does, which names the columns of the
                source.
            columns: from fields to columns that were read for them already.
        """
        own = {name: columns.get(column, column) for name, column in self.columns.items()}
        names = {**columns, **own}

        def read(record: Any) -> tuple[Any, Any]:
            try:
                converted = self.convert(record) if isinstance(record, Mapping) else record
                return converted, normalise(converted)
            except BadRow as problem:
                raise problem.in_columns(names) from None

        return read


def renamed_format(
    columns: Mapping[str, str], unread: str = "", *, tentative: bool = False
) -> Format:
    """Our fields under other names.

    Args:
        columns: from fields to columns; without any, records pass as they are.
        unread: what else the log says.
        tentative: see :class:`Format`.
    """
    if not columns:
        return Format(unread, tentative=tentative)
    text = "; ".join(filter(None, [meaning_of(columns), unread]))
    return Format(text, columns, lambda record: renamed(record, columns), tentative)


def recognise(
    records: Records, find: Callable[[Record], Format | None], source: str
) -> tuple[Format, Records]:
    """The format of a source, and all its records.

    Args:
        find: the format of a record, or None where it has nothing to tell it by; raises
            :class:`BadRow` for columns that can be read in several ways.
        source: as messages call it.

    Raises:
        DataError: there are such columns.
    """
    stream = iter(records)
    seen: list[tuple[Place, Any]] = []
    found: Format | None = None
    while found is None or found.tentative:
        most = _MOST_ASKED if found is None else _MOST_COMPARED
        entry = next(stream, None) if len(seen) < most else None
        if entry is None:
            break
        seen.append(entry)
        if isinstance(entry[1], Mapping):
            try:
                found = find(entry[1]) or found
            except BadRow as problem:
                raise DataError(f"{source}: {problem}") from None
    if found is not None and found.meaning:
        logger.info("%s: %s", source, found.meaning)
    return found or Format(), chain(seen, stream)


def meaning_of(columns: Mapping[str, str]) -> str:
    """Which column is read for which field, for the log."""
    return ", ".join(f"{column!r} is read as {name!r}" for name, column in columns.items())


def renamed(record: Record, columns: Mapping[str, str]) -> Record:
    """A record with the fields that ``columns`` maps to columns; those are gone."""
    taken = {*columns, *columns.values()}
    kept = {name: value for name, value in record.items() if name not in taken}
    read = {name: record[column] for name, column in columns.items() if column in record}
    return {**kept, **read}
