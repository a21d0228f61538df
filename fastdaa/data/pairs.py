"""Preference pairs from a file, a folder, the hub or a dataset in memory, checked row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from fastdaa.data.bad_rows import OnBadRow, good_rows
from fastdaa.data.errors import bad_field, mixed_formats
from fastdaa.data.formats import recognise
from fastdaa.data.kinds import CheckedRow, RecordKind
from fastdaa.data.known_formats import pair_format
from fastdaa.data.named_columns import NamedColumns
from fastdaa.data.readers import Records
from fastdaa.data.reports import SkipReport
from fastdaa.data.validate import (
    PAIR_FIELDS,
    TEMPLATE_FIELDS,
    is_conversational,
    normalise_pair,
)

if TYPE_CHECKING:
    from datasets import Dataset


def load_pairs(
    source: str | PathLike[str] | Dataset,
    *,
    split: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """Reads preference pairs, checks every row, and brings all into one form.

    Args:
        source: a ``.json``, ``.jsonl``, ``.ndjson``, ``.csv`` (each also ``.gz``) or ``.parquet``
            file; a folder of such files; a folder written by ``Dataset.save_to_disk``; a hub id
            ``owner/name``; or a ``datasets.Dataset``. Text may name configuration and split behind
            it: ``owner/name:config:split``, ``folder::split``.
        split: which split, where the source has several; by default the only one, or ``train``.
        name: configuration of a hub dataset.
        limit: read only so many good rows; the rows behind them are not looked at.
        on_bad_row: ``"error"`` stops at the first bad row; ``"skip"`` leaves such rows out and
            logs how many, by reason.
        columns: from the fields ``prompt``, ``chosen``, ``rejected``, ``completion`` and
            ``messages`` to columns of other names that are read for them.

    Returns:
        A dataset in memory (nothing is written to disk) with the columns ``prompt``, ``chosen``,
        ``rejected``: all text or all lists of messages; ``tools`` (JSON text) and
        ``chat_template_kwargs`` where a conversation has them; and the source's other columns
        that hold plain numbers or text. Scored completions (``prompt``, ``completion``, ``score``)
        come as pairs with ``chosen_advantage`` and ``rejected_advantage``.

    Raises:
        DataError: a source that cannot be found or read, a column that is missing or can be read in
            several ways, a bad row, or no usable row at all.
        ValueError: an unknown ``on_bad_row``, a ``limit`` below 1, or ``columns`` for other fields.
    """
    named = NamedColumns(columns or {})
    return PAIRS.load(
        source, split=split, name=name, limit=limit, on_bad_row=on_bad_row, columns=named
    )


def read_pairs(
    source: str | PathLike[str] | Dataset,
    *,
    split: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
    columns: Mapping[str, str] | None = None,
) -> tuple[Dataset, SkipReport]:
    """:func:`load_pairs`, with the report of the rows that were left out beside the dataset."""
    named = NamedColumns(columns or {})
    found = PAIRS.read(
        source, split=split, name=name, limit=limit, on_bad_row=on_bad_row, columns=named
    )
    return PAIRS.dataset(found.rows, found.extras), found.report


def checked_pairs(
    records: Records,
    on_bad_row: OnBadRow,
    report: SkipReport,
    *,
    source: str = "dataset",
    columns: Mapping[str, str] | None = None,
) -> Iterator[CheckedRow]:
    """Good pairs among ``records``, each with its place and the fields that are none of ours.

    Bad rows are counted in ``report``, or raised as :class:`DataError` with their place. All rows
    must be of the first one's kind: conversations or text, with or without ``prompt``.

    Args:
        records: in our fields, or in a format of :mod:`fastdaa.data.known_formats`.
        on_bad_row, report: what becomes of bad rows.
        source: as messages call it.
        columns: from fields to the columns that were read for them already.
    """
    columns = columns or {}
    found, records = recognise(records, lambda first: pair_format(first, columns), source)
    first: tuple[bool, bool] | None = None

    def normalise(record: Any) -> dict[str, Any]:
        nonlocal first
        pair = normalise_pair(record)
        conversational, prompted = is_conversational(pair), record.get("prompt") is not None
        first = first or (conversational, prompted)
        if conversational != first[0]:
            raise mixed_formats("chosen", pair["chosen"], "as in the first row")
        if prompted != first[1]:
            kinds = ("no prompt", "one") if prompted else ("a prompt", "none")
            raise bad_field("mixed formats", "prompt", f"{kinds[0]} as in the first row", kinds[1])
        return pair

    ours = (*PAIR_FIELDS, *TEMPLATE_FIELDS)
    read = found.reader(normalise, columns)
    for place, (record, pair) in good_rows(records, read, on_bad_row, report):
        yield place, pair, {field: value for field, value in record.items() if field not in ours}


PAIRS = RecordKind("pair", PAIR_FIELDS, checked_pairs, scored=True)
