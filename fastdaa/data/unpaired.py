"""Unpaired preferences: prompts with one completion each, and whether that is desirable.

A record has ``prompt`` and ``completion`` (text or messages), or is in another form of
:mod:`fastdaa.data.examples` with one completion, and has a ``label``: true or false.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fastdaa.data.bad_rows import OnBadRow, good_rows
from fastdaa.data.errors import BadRow, bad_field, describe, mixed_formats
from fastdaa.data.examples import EXAMPLE_FIELDS, normalise_example
from fastdaa.data.fields import LABEL_FIELD
from fastdaa.data.formats import recognise
from fastdaa.data.kinds import CheckedRow, RecordKind
from fastdaa.data.known_formats import example_format
from fastdaa.data.named_columns import NamedColumns
from fastdaa.data.readers import Records
from fastdaa.data.reports import SkipReport
from fastdaa.data.validate import TEMPLATE_FIELDS

if TYPE_CHECKING:
    from datasets import Dataset

UNPAIRED_FIELDS = (*EXAMPLE_FIELDS, LABEL_FIELD)
_SIDES = ("chosen", "rejected", "chosen_response", "rejected_response")
_WORDS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def load_unpaired(
    source: str | PathLike[str] | Dataset,
    *,
    split: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """Reads prompts with labelled completions, as :func:`fastdaa.data.load_pairs` reads pairs.

    Args:
        source, split, name, limit, on_bad_row: as there.
        columns: from the fields ``prompt``, ``completion``, ``messages`` and ``label`` to columns
            of other names that are read for them.

    Returns:
        A dataset in memory with the columns ``prompt`` and ``completion`` (both text or both lists
        of messages) and ``label`` (bool), and the others of :func:`fastdaa.data.load_pairs`.

    Raises:
        DataError, ValueError: as there.
    """
    named = NamedColumns(columns or {})
    return UNPAIRED.load(
        source, split=split, name=name, limit=limit, on_bad_row=on_bad_row, columns=named
    )


def is_unpaired(
    record: Mapping[str, Any], columns: Mapping[str, str] = MappingProxyType({})
) -> bool:
    """Whether a record is no pair, and no scored completion, which would become part of one.

    Args:
        columns: from fields to columns that the user has named.
    """
    known = {*record, *columns}
    return known.isdisjoint(_SIDES) and (LABEL_FIELD in known or "score" not in known)


def checked_unpaired(
    records: Records,
    on_bad_row: OnBadRow,
    report: SkipReport,
    *,
    source: str = "dataset",
    columns: Mapping[str, str] | None = None,
) -> Iterator[CheckedRow]:
    """Good records, all of the first one's kind; their labels are among the extras.

    The arguments are those of :func:`fastdaa.data.pairs.checked_pairs`.
    """
    columns = columns or {}
    found, records = recognise(records, lambda first: example_format(first, columns), source)
    first: type | None = None

    def normalise(record: Any) -> dict[str, Any]:
        nonlocal first
        _check_unpaired(record)
        row = normalise_example(record)
        kind = type(row["prompt"])
        first = first or kind
        if kind is not first:
            raise mixed_formats("prompt", row["prompt"], "as before")
        return {**row, LABEL_FIELD: read_label(record[LABEL_FIELD])}

    ours = (*UNPAIRED_FIELDS, "messages", *TEMPLATE_FIELDS)
    read = found.reader(normalise, columns)
    for place, (record, row) in good_rows(records, read, on_bad_row, report):
        extras = {field: value for field, value in record.items() if field not in ours}
        yield place, row, {**extras, LABEL_FIELD: row.pop(LABEL_FIELD)}


def read_label(value: Any) -> bool:
    """A label as a bool: true or false, 1 or 0, or one of these as text, as CSV holds it.

    Raises:
        BadRow: it is none of them.
    """
    known = _WORDS.get(value.strip().lower()) if isinstance(value, str) else None
    if known is None and isinstance(value, bool | int | float) and value in (0, 1):
        known = bool(value)
    if known is None:
        raise bad_field("wrong label", LABEL_FIELD, "true or false", describe(value))
    return known


def _check_unpaired(record: Any) -> None:
    """Raise ``BadRow`` for what lacks a label, or holds a pair."""
    if not isinstance(record, Mapping):
        return  # whatever reads it says so
    shown = ", ".join(map(repr, record)) or "no fields"
    for side in ("chosen", "rejected"):
        if record.get(side) is not None:
            raise BadRow(
                "a pair",
                "expected unpaired data, one 'completion' with its 'label' a row, got a preference "
                f"pair ({shown})",
            )
    if LABEL_FIELD not in record:
        raise bad_field(
            "missing label", LABEL_FIELD, "true or false beside each completion (unpaired data)",
            f"only {shown}; label_column says which column holds it, and pairs have 'chosen' and "
            "'rejected'",
        )  # fmt: skip


UNPAIRED = RecordKind("example", EXAMPLE_FIELDS, checked_unpaired)
