"""Columns that a user has named: they are read for fields of ours, whatever else there is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from fastdaa.data.errors import DataError
from fastdaa.data.formats import meaning_of, renamed
from fastdaa.data.readers import Place, Records

logger = logging.getLogger(__name__)
COLUMN_FIELDS = ("prompt", "chosen", "rejected", "completion", "messages", "text", "label")
"""Fields that a column of another name can be read for."""
_MOST_ASKED = 100


@dataclass
class NamedColumns:
    """Columns that a user has named.

    Args:
        names: from fields of ``COLUMN_FIELDS`` to columns.
        required: which sources have to have them.

    Raises:
        ValueError: a field that does not exist, or one column for two of them.
    """

    names: Mapping[str, str]
    required: Literal["everywhere", "somewhere", "nowhere"] = "everywhere"
    _found: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in COLUMN_FIELDS]
        if unknown:
            raise ValueError(
                f"columns: expected fields among {', '.join(COLUMN_FIELDS)}, got {unknown[0]!r}"
            )
        if len(set(self.names.values())) < len(self.names):
            raise ValueError(f"columns: expected different columns, got {dict(self.names)}")

    def read(self, records: Records, source: str) -> tuple[dict[str, str], Records]:
        """From fields to those of the columns that a source has, and its records with the fields.

        Raises:
            DataError: a column that the source has to have is missing in its first records.
        """
        stream = iter(records)
        seen: list[tuple[Place, Any]] = []
        known: dict[str, None] = {}
        while self._missing(known) and len(seen) < _MOST_ASKED:
            entry = next(stream, None)
            if entry is None:
                break
            seen.append(entry)
            if isinstance(entry[1], Mapping):
                known |= dict.fromkeys(entry[1])
        missing = self._missing(known)
        if self.required == "everywhere" and known and missing:
            raise self._error(missing[0], source, ", ".join(map(repr, known)))
        columns = {name: column for name, column in self.names.items() if column in known}
        self._found.update(columns)
        whole = chain(seen, stream)
        if not columns:
            return {}, whole
        logger.info("%s: %s", source, meaning_of(columns))
        return columns, (
            (place, renamed(record, columns) if isinstance(record, Mapping) else record)
            for place, record in whole
        )

    def check_found(self, sources: str) -> None:
        """Raise ``DataError`` for a column that no source had, and one has to have."""
        for name in self.names:
            if self.required == "somewhere" and name not in self._found:
                raise self._error(name, sources, "none with it")

    def _missing(self, known: Mapping[str, None]) -> list[str]:
        return [name for name, column in self.names.items() if column not in known]

    def _error(self, name: str, source: str, got: str) -> DataError:
        expected = f"{name}_column: expected a column {self.names[name]!r}"
        return DataError(f"{source}: {expected}, got {got}")
