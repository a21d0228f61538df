"""Preference pairs from a file, a folder, the hub or a dataset in memory, checked row by row."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any

from fastdaa.data.bad_rows import OnBadRow, good_rows
from fastdaa.data.readers import Place, Records
from fastdaa.data.reports import SkipReport
from fastdaa.data.scored import pair_scored
from fastdaa.data.sources import name_of, nothing_in, open_source
from fastdaa.data.tables import to_dataset
from fastdaa.data.validate import (
    PAIR_FIELDS,
    TEMPLATE_FIELDS,
    bad_field,
    is_conversational,
    normalise_pair,
)
from fastdaa.validation import check_choice, check_positive

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def load_pairs(
    source: str | PathLike[str] | Dataset,
    *,
    split: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> Dataset:
    """Reads preference pairs, checks every row, and brings all into one form.

    Args:
        source: a ``.json``, ``.jsonl``, ``.ndjson``, ``.csv`` (each also ``.gz``) or ``.parquet``
            file; a folder of such files; a folder written by ``Dataset.save_to_disk``; a hub id
            ``owner/name``; or a ``datasets.Dataset``.
        split: which split, where the source has several; by default the only one, or ``train``.
        name: configuration of a hub dataset.
        limit: read only so many good rows; the rows behind them are not looked at.
        on_bad_row: ``"error"`` stops at the first bad row; ``"skip"`` leaves such rows out and
            logs how many, by reason.

    Returns:
        A dataset in memory (nothing is written to disk) with the columns ``prompt``, ``chosen``,
        ``rejected``: all text or all lists of messages; ``tools`` (JSON text) and
        ``chat_template_kwargs`` where a conversation has them; and the source's other columns
        that hold plain numbers or text. Scored completions (``prompt``, ``completion``, ``score``)
        come as pairs with ``chosen_advantage`` and ``rejected_advantage``.

    Raises:
        DataError: a source that cannot be found or read, a bad row, or no usable row at all.
        ValueError: an unknown ``on_bad_row`` or a ``limit`` below 1.
    """
    dataset, report = read_pairs(source, split=split, name=name, limit=limit, on_bad_row=on_bad_row)
    if report.skipped:
        logger.warning("%s: %s", name_of(source), report)
    return dataset


def read_pairs(
    source: str | PathLike[str] | Dataset,
    *,
    split: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> tuple[Dataset, SkipReport]:
    """:func:`load_pairs`, with the report of the rows that were left out beside the dataset."""
    check_choice("on_bad_row", on_bad_row, ("error", "skip"))
    check_positive("limit", limit)
    report = SkipReport()
    records = pair_scored(open_source(source, split, name))
    found = list(islice(checked_pairs(records, on_bad_row, report), limit))
    report.kept = len(found)
    if not found:
        raise nothing_in(source, "pair", report)
    pairs, extras = [pair for _, pair, _ in found], [extra for _, _, extra in found]
    return to_dataset(pairs, PAIR_FIELDS, extras), report


def checked_pairs(
    records: Records, on_bad_row: OnBadRow, report: SkipReport
) -> Iterator[tuple[Place, dict[str, Any], dict[str, Any]]]:
    """Good pairs among ``records``, each with its place and the fields that are none of ours.

    Bad rows are counted in ``report``, or raised as :class:`DataError` with their place. All rows
    must be of the first one's kind: conversations or text, with or without ``prompt``.
    """
    kind: tuple[bool, bool] | None = None

    def read(record: Any) -> dict[str, Any]:
        nonlocal kind
        pair = normalise_pair(record)
        found = (is_conversational(pair), record.get("prompt") is not None)
        kind = kind or found
        _check_kind(kind, found)
        return pair

    ours = (*PAIR_FIELDS, *TEMPLATE_FIELDS)
    for place, record, pair in good_rows(records, read, on_bad_row, report):
        yield place, pair, {field: value for field, value in record.items() if field not in ours}


def _check_kind(first: tuple[bool, bool], found: tuple[bool, bool]) -> None:
    if first[0] != found[0]:
        kinds = ("a list of messages", "text") if first[0] else ("text", "a list of messages")
        raise bad_field("mixed formats", "chosen", f"{kinds[0]} as in the first row", kinds[1])
    if first[1] != found[1]:
        kinds = ("a prompt", "none") if first[1] else ("no prompt", "one")
        raise bad_field("mixed formats", "prompt", f"{kinds[0]} as in the first row", kinds[1])
