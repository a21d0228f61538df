"""Checked rows as a ``datasets.Dataset`` in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from fastdaa.data.validate import TEMPLATE_FIELDS

if TYPE_CHECKING:
    from datasets import Dataset


def to_dataset(
    rows: Sequence[dict[str, Any]], fields: Sequence[str], extras: Sequence[dict[str, Any]] = ()
) -> Dataset:
    """A dataset of rows that are all text or all conversations.

    Args:
        rows: at least one; ``fields`` in all of them, ``tools`` and ``chat_template_kwargs`` of
            conversations in any.
        fields: columns of text or lists of messages.
        extras: further fields of every row, kept where they hold plain numbers or text.
    """
    import datasets

    columns: dict[str, list[Any]] = {field: [row[field] for row in rows] for field in fields}
    text = datasets.Value("string")
    if isinstance(rows[0][fields[0]], str):
        features: dict[str, Any] = dict.fromkeys(fields, text)
    else:
        simple = all(map(_is_simple, chain.from_iterable(chain(*columns.values()))))
        messages = [{"role": text, "content": text}] if simple else [datasets.Json()]
        features = dict.fromkeys(fields, messages)
        for field in TEMPLATE_FIELDS:
            if any(field in row for row in rows):
                columns[field] = [row.get(field) for row in rows]
                features[field] = text if field == "tools" else datasets.Json()
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
