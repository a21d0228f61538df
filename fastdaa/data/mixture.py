"""Several sources as one dataset, each with its weight, and their share of the evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastdaa.data.bad_rows import OnBadRow
from fastdaa.data.errors import DataError
from fastdaa.data.fields import PLACE_FIELD, SOURCE_FIELD
from fastdaa.data.kinds import RecordKind, Rows
from fastdaa.data.named_columns import NamedColumns
from fastdaa.data.pairs import PAIRS
from fastdaa.data.reports import MixtureReport, SourceReport
from fastdaa.data.sampling import Chosen, choose_rows
from fastdaa.data.sources import name_of
from fastdaa.validation import check_positive

if TYPE_CHECKING:
    from datasets import Dataset


class Mixture(NamedTuple):
    """What was read out of several sources."""

    train: Dataset
    evaluation: Dataset | None
    """Rows that were held out, where ``test_size`` asked for some."""
    report: MixtureReport


def load_mixture(
    sources: Sequence[str | PathLike[str] | Dataset],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    test_size: float | None = None,
    limit: int | None = None,
    split: str | None = None,
    name: str | None = None,
    on_bad_row: OnBadRow = "error",
    columns: Mapping[str, str] | NamedColumns | None = None,
    kind: RecordKind = PAIRS,
) -> Mixture:
    """Reads several sources into one dataset.

    A source of ``n`` rows and weight ``w`` gives ``round(w n)`` of them: with 1 every row once,
    with 0.25 a random quarter, with 2.5 every row twice and a random half of them once more. Rows
    that are held out come from all sources in proportion to ``n min(w, 1)``, none of them twice,
    and the weights are those of the rest. What is drawn from a source depends on ``seed`` and on
    its place among the sources.

    Args:
        sources: see :func:`fastdaa.data.load_pairs`; all text or all conversations.
        weights: one a source; 1 each by default.
        seed: of what is drawn.
        test_size: hold out that share (below 1) or number of rows.
        limit: of the rows to train on, take a random choice of that many.
        split, name: for sources that do not say them themselves.
        on_bad_row: as for one source.
        columns: as for one source; one of several sources has to have them.
        kind: pairs, examples or prompts.

    Returns:
        Datasets in memory, the sources one behind the other, with two columns more than that of one
        source: ``mixture_source`` and ``mixture_place``, which messages name.

    Raises:
        DataError: as for one source, and for text beside conversations.
        ValueError: weights that do not fit, a source that is there twice, or nothing left to train
            on.
    """
    weights = [1.0] * len(sources) if weights is None else [*weights]
    check_sources(sources, weights)
    check_positive("limit", limit)
    check_positive("test_size", test_size)
    names = [_name(source, place) for place, source in enumerate(sources, start=1)]
    if isinstance(columns, NamedColumns):
        named = columns
    else:
        named = NamedColumns(columns or {}, "everywhere" if len(sources) == 1 else "somewhere")
    parts = [
        kind.read(source, split=split, name=name, on_bad_row=on_bad_row, columns=named)
        for source in sources
    ]
    named.check_found(", ".join(names))
    _check_same_kind(parts, names, kind.fields[0])
    sizes = [len(part.rows) for part in parts]
    chosen = choose_rows(sizes, weights, seed=seed, test_size=test_size, limit=limit)
    report = MixtureReport(
        [
            SourceReport(*source)
            for source in zip(
                names, weights, sizes, map(len, chosen.train), map(len, chosen.held_out),
                (part.report for part in parts), strict=True,
            )
        ],
        kind.unit,
    )  # fmt: skip
    if limit is None:
        report.check_all_used()
    train, held_out = _selected(_joined(kind, parts, names), sizes, chosen)
    return Mixture(train, None if test_size is None else held_out, report)


def check_sources(sources: Sequence[Any], weights: Sequence[float] | None) -> None:
    """Check what does not need the data.

    Raises:
        ValueError: no source, one that is there twice, or weights that do not fit.
    """
    if isinstance(sources, str) or not len(sources):
        raise ValueError(f"dataset: expected a list of sources, got {sources!r}")
    texts = [str(source) for source in sources if isinstance(source, str | PathLike)]
    twice = [text for place, text in enumerate(texts) if text in texts[:place]]
    if twice:
        raise ValueError(
            f"dataset: expected every source once, got {twice[0]} again; a weight of 2 uses its "
            "rows twice"
        )
    if weights is None:
        return
    if len(weights) != len(sources):
        raise ValueError(
            f"dataset_weights: expected one a dataset, {len(sources)} of them, got {len(weights)}"
        )
    for weight in weights:
        check_positive("dataset_weights", weight)


def _name(source: Any, place: int) -> str:
    return name_of(source) if isinstance(source, str | PathLike) else f"dataset {place}"


def _check_same_kind(parts: Sequence[Rows], names: Sequence[str], field: str) -> None:
    kinds = ["text" if isinstance(part.rows[0][field], str) else "conversations" for part in parts]
    for name, kind in zip(names, kinds, strict=True):
        if kind != kinds[0]:
            raise DataError(f"{name}: expected {kinds[0]} as in {names[0]}, got {kind}")


def _joined(kind: RecordKind, parts: Sequence[Rows], names: Sequence[str]) -> Dataset:
    """All rows, each with where it comes from."""
    extras = [
        {**extra, SOURCE_FIELD: name, PLACE_FIELD: place}
        for part, name in zip(parts, names, strict=True)
        for extra, place in zip(part.extras, part.places, strict=True)
    ]
    return kind.dataset([row for part in parts for row in part.rows], extras)


def _selected(whole: Dataset, sizes: Sequence[int], chosen: Chosen) -> list[Dataset]:
    starts = np.cumsum([0, *sizes[:-1]])
    return [
        whole.select(
            np.concatenate([start + rows for start, rows in zip(starts, picked, strict=True)])
        )
        for picked in chosen
    ]
