"""Errors about data: what cannot be used, in which field, what was expected and what came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdaa.validation import shown


class DataError(ValueError):
    """Data that cannot be used: where, which field, what was expected and what came."""


class BadRow(DataError):
    """One row that cannot be used; the reader adds where it is.

    Attributes:
        reason: a short phrase under which such rows are counted.
        field: that is wrong, where it is one.
    """

    def __init__(self, reason: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.reason, self.field = reason, field

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str, str | None]]:
        # It comes out of other processes, too.
        return type(self), (self.reason, str(self), self.field)

    def in_columns(self, columns: Mapping[str, str]) -> BadRow:
        """The same problem, its field named as the column that was read for it.

        Args:
            columns: from fields to columns; what is not among them keeps its name.
        """
        name = (self.field or "").split("[")[0].split(".")[0]
        if columns.get(name, name) == name:
            return self
        column = columns[name] + str(self.field)[len(name) :]
        message = str(self).replace(f"field {self.field!r}", f"field {column!r}", 1)
        return BadRow(self.reason, message, column)


def bad_field(reason: str, field: str, expected: str, got: str) -> BadRow:
    """A :class:`BadRow` in the usual words."""
    return BadRow(reason, f"field {field!r}: expected {expected}, got {got}", field)


def mixed_formats(field: str, value: object, like: str) -> BadRow:
    """A :class:`BadRow` for text where messages are expected, or the other way round.

    Args:
        like: what has the expected form, such as ``as in 'chosen'``.
    """
    kinds = ("text", "a list of messages")
    expected, got = kinds if isinstance(value, list) else kinds[::-1]
    return bad_field("mixed formats", field, f"{expected} {like}", got)


def describe(value: Any) -> str:
    """``value`` in a few words, for an error message."""
    if value is None:
        return "null"
    text = shown(value)
    return text if isinstance(value, str) else f"{type(value).__name__} {text}"
