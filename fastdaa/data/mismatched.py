"""Prompts with a completion of another one, each the same for a whole run.

KTO's baseline reads them (arXiv 2402.01306). Where its log-probs under the reference come from a
cache, they cannot depend on the micro-batch: here they depend on the contents of the dataset alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdaa.data.columns import TokenColumns
from fastdaa.data.fields import MISMATCHED_FIELD, SEQUENCE_FIELDS, TOKEN_FIELDS
from fastdaa.data.rows import UnpairedRows

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_AT_ONCE = 4096


def partners(dataset: Dataset) -> np.ndarray:
    """Whose completion every prompt is given, ``[rows]`` int64.

    Rows stand in the order of digests of their tokens, and each has the next one with another
    prompt, the last one that of the beginning: any with another prompt is as likely, whatever order
    the dataset is in, and most stay where rows are added. Where all prompts are the same, each has
    the next row.

    Args:
        dataset: with ``prompt_ids``, ``completion_ids`` and ``label``.
    """
    digests: list[bytes] = []
    prompts: list[bytes] = []
    for row in _rows(UnpairedRows(dataset)):
        ids = [np.asarray(row[field], dtype="<i4").tobytes() for field in SEQUENCE_FIELDS]
        prompts.append(_digest(ids[0]))
        digests.append(_digest(prompts[-1] + ids[1]))
    order = sorted(range(len(digests)), key=digests.__getitem__)
    found, following = np.empty(len(order), dtype=np.int64), None
    # The second lap, towards the beginning, knows what follows the end.
    for place in reversed([*range(len(order)), *range(len(order))]):
        row, after = order[place], order[(place + 1) % len(order)]
        if prompts[row] != prompts[after]:
            following = after
        found[row] = after if following is None else following
    return found


def crossed_pairs(
    dataset: Dataset, cross: Callable[[Mapping[str, Any], Any], Mapping[str, Any]]
) -> Dataset:
    """Pairs of a prompt, the completion that it is given as chosen, and an empty rejected one.

    Args:
        dataset: as of :func:`partners`; its ``mismatched_ids``, if it has them, are what is given.
        cross: puts a row and a completion together within the longest sequence.
    """
    rows, columns = UnpairedRows(dataset), TokenColumns(TOKEN_FIELDS)
    if MISMATCHED_FIELD in dataset.column_names:
        given = (row[MISMATCHED_FIELD] for row in _rows(rows))
    else:
        given = (row[SEQUENCE_FIELDS[1]] for row in _rows(rows, partners(dataset)))
    for row, completion in zip(_rows(rows), given, strict=True):
        crossed = cross(row, completion)
        columns.add([*(crossed[field] for field in SEQUENCE_FIELDS), []], ())
    return columns.to_dataset()


def _rows(rows: UnpairedRows, places: np.ndarray | None = None) -> Iterator[Mapping[str, Any]]:
    """Rows one by one, all or those at ``places``, read many at once."""
    places = np.arange(len(rows)) if places is None else places
    for start in range(0, len(places), _ROWS_AT_ONCE):
        yield from rows.__getitems__(places[start : start + _ROWS_AT_ONCE].tolist())


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
