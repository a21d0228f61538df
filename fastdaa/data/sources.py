"""Preference pairs from a file, a folder, the hub or a dataset in memory, checked row by row."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastdaa.data.readers import Place, Records, kind_of, read_file
from fastdaa.data.reports import SkipReport
from fastdaa.data.scored import pair_scored
from fastdaa.data.validate import (
    PAIR_FIELDS,
    TEMPLATE_FIELDS,
    BadRow,
    DataError,
    bad_field,
    is_conversational,
    normalise_pair,
)
from fastdaa.validation import check_choice, check_positive

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
OnBadRow = Literal["error", "skip"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=$|[^a-zA-Z])")


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
        logger.warning("%s: %s", _name_of(source), report)
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
    pairs: list[dict[str, Any]] = []
    extras: list[dict[str, Any]] = []
    for _, pair, extra in check_records(
        pair_scored(_open_source(source, split, name)), on_bad_row, report
    ):
        pairs.append(pair)
        extras.append(extra)
        if limit is not None and len(pairs) >= limit:
            break
    report.kept = len(pairs)
    if not pairs:
        detail = f" ({report})" if report.skipped else ""
        raise DataError(f"{_name_of(source)}: expected at least one pair, got none{detail}")
    return _to_dataset(pairs, extras), report


def check_records(
    records: Records, on_bad_row: OnBadRow, report: SkipReport
) -> Iterator[tuple[Place, dict[str, Any], dict[str, Any]]]:
    """Good pairs among ``records``, each with its place and the fields that are none of ours.

    Bad rows are counted in ``report``, or raised as :class:`DataError` with their place. All rows
    must be of the first one's kind: conversations or text, with or without ``prompt``.
    """
    kind: tuple[bool, bool] | None = None
    for place, record in records:
        try:
            if isinstance(record, BadRow):
                raise record
            pair = normalise_pair(record)
            found = (is_conversational(pair), record.get("prompt") is not None)
            kind = kind or found
            _check_kind(kind, found)
        except BadRow as error:
            handle_bad_row(place, error, on_bad_row, report)
            continue
        ours = (*PAIR_FIELDS, *TEMPLATE_FIELDS)
        yield place, pair, {field: value for field, value in record.items() if field not in ours}


def handle_bad_row(place: Place, problem: BadRow, on_bad_row: OnBadRow, report: SkipReport) -> None:
    """Counts a bad row in ``report``, or raises it as :class:`DataError` with its place."""
    if on_bad_row == "error":
        hint = "on_bad_row='skip' leaves such rows out and counts them"
        raise DataError(f"{place}: {problem} ({hint})") from problem
    report.skip(problem.reason, f"{place}: {problem}")


def _check_kind(first: tuple[bool, bool], found: tuple[bool, bool]) -> None:
    if first[0] != found[0]:
        kinds = ("a list of messages", "text") if first[0] else ("text", "a list of messages")
        raise bad_field("mixed formats", "chosen", f"{kinds[0]} as in the first row", kinds[1])
    if first[1] != found[1]:
        kinds = ("a prompt", "none") if first[1] else ("no prompt", "one")
        raise bad_field("mixed formats", "prompt", f"{kinds[0]} as in the first row", kinds[1])


def _open_source(
    source: str | PathLike[str] | Dataset, split: str | None, name: str | None
) -> Records:
    if not isinstance(source, str | PathLike):
        return rows_of(_pick_split(source, split, "dataset"), "dataset")
    path = Path(source).expanduser()
    if path.is_file():
        _pick_name([_split_of(Path(path.name)) or "train"], split, str(path))
        return read_file(path)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            import datasets

            saved = datasets.load_from_disk(str(path))
            return rows_of(_pick_split(saved, split, str(path)), str(path))
        return chain.from_iterable(map(read_file, _files_of(path, split)))
    text = str(source)
    if not _HUB_ID.fullmatch(text) or kind_of(path):
        raise DataError(
            f"{text}: expected a file, a folder, or a hub id 'owner/name'; "
            "there is no such file or folder"
        )
    return rows_of(_pick_split(_load_from_hub(text, name), split, text), text)


def _load_from_hub(hub_id: str, name: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(hub_id, name)
    except Exception as error:
        # Anything may go wrong between here and the hub; the first line says what did.
        what = (str(error).strip().splitlines() or ["no message"])[0]
        raise DataError(
            f"{hub_id}: expected a local path or a hub dataset that can be reached; there is no "
            f"such path, and loading it from the hub failed: {type(error).__name__}: {what}"
        ) from error


def _files_of(folder: Path, split: str | None) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and kind_of(path))
    if not files:
        expected = "files that end with .jsonl, .json, .csv or .parquet (or .gz)"
        raise DataError(f"{folder}: expected {expected}, or a saved dataset; found none")
    splits = [_split_of(path.relative_to(folder)) or "train" for path in files]
    wanted = _pick_name(sorted(set(splits)), split, str(folder))
    return [path for path, found in zip(files, splits, strict=True) if found == wanted]


def _split_of(path: Path) -> str | None:
    """The split that a file's name, or the folder it lies in, begins with."""
    for part in (path.name, path.parent.name):
        match = _SPLIT_NAME.match(part.lower())
        if match:
            return match[1]
    return None


def _pick_split(loaded: Any, split: str | None, source: str) -> Any:
    if isinstance(loaded, Mapping):
        return loaded[_pick_name(list(loaded), split, source)]
    own = str(getattr(loaded, "split", None) or "train")
    _pick_name([own], split, source)
    return loaded


def _pick_name(splits: list[str], split: str | None, source: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    wanted = split or "train"
    if wanted in splits:
        return wanted
    got = "no split given" if split is None else repr(split)
    raise DataError(f"{source}: split: expected one of {', '.join(splits)}, got {got}")


def rows_of(dataset: Any, source: str) -> Records:
    number = 0
    for columns in dataset.with_format(None).iter(batch_size=1024):
        fields = list(columns)
        for values in zip(*columns.values(), strict=True):
            number += 1
            yield f"{source}: row {number}", dict(zip(fields, values, strict=True))


def _to_dataset(pairs: list[dict[str, Any]], extras: list[dict[str, Any]]) -> Dataset:
    import datasets

    columns: dict[str, list[Any]] = {
        field: [pair[field] for pair in pairs] for field in PAIR_FIELDS
    }
    text = datasets.Value("string")
    if is_conversational(pairs[0]):
        simple = all(map(_is_simple, chain.from_iterable(chain(*columns.values()))))
        messages = [{"role": text, "content": text}] if simple else [datasets.Json()]
        features: dict[str, Any] = dict.fromkeys(PAIR_FIELDS, messages)
        for field in TEMPLATE_FIELDS:
            if any(field in pair for pair in pairs):
                columns[field] = [pair.get(field) for pair in pairs]
                features[field] = text if field == "tools" else datasets.Json()
    else:
        features = dict.fromkeys(PAIR_FIELDS, text)
    for field in dict.fromkeys(chain.from_iterable(extras)):
        values = [extra.get(field) for extra in extras]
        kind = _plain_kind(values)
        if kind is not None:
            columns[field], features[field] = values, datasets.Value(kind)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _is_simple(message: dict[str, Any]) -> bool:
    return message.keys() == {"role", "content"} and isinstance(message["content"], str)


def _plain_kind(values: Iterable[Any]) -> str | None:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and float in kinds:
        return "float64"
    names = {bool: "bool", int: "int64", str: "string"}
    return names.get(kinds.pop()) if len(kinds) == 1 else None


def _name_of(source: object) -> str:
    return str(source) if isinstance(source, str | PathLike) else "dataset"
