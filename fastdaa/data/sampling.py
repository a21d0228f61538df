"""Which rows of several sources are trained on, and which are held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Chosen(NamedTuple):
    """Row numbers ``[rows]`` int64, source by source."""

    train: list[np.ndarray]
    held_out: list[np.ndarray]


def choose_rows(
    sizes: Sequence[int],
    weights: Sequence[float],
    *,
    seed: int,
    test_size: float | None = None,
    limit: int | None = None,
) -> Chosen:
    """Draws rows as :func:`fastdaa.data.load_mixture` describes.

    Args:
        sizes: rows of every source.
        weights: how often each of them is used.
        seed: of what is drawn.
        test_size: hold out that share (below 1) or number of rows.
        limit: keep a random choice of that many rows to train on.

    Raises:
        ValueError: as many rows are to be held out as there are.
    """
    counts = [0] * len(sizes) if test_size is None else _held_out(sizes, weights, test_size)
    train, held_out = [], []
    for place, (size, weight, held) in enumerate(zip(sizes, weights, counts, strict=True)):
        # One stream a source: what is drawn from it does not depend on those behind it.
        order = np.random.default_rng([seed, place]).permutation(size)
        held_out.append(np.sort(order[:held]))
        rest = order[held:]
        passes, share = divmod(weight, 1)
        once_more = rest[: math.floor(share * len(rest) + 0.5)]
        train.append(np.concatenate([*[np.sort(rest)] * int(passes), np.sort(once_more)]))
    if limit is not None:
        train = _limited(train, limit, seed)
    return Chosen(train, held_out)


def _held_out(sizes: Sequence[int], weights: Sequence[float], test_size: float) -> list[int]:
    """How many rows each source gives to the evaluation: largest remainders."""
    given = [size * min(weight, 1.0) for size, weight in zip(sizes, weights, strict=True)]
    total = sum(given)
    # Less a trifle, so that a tenth of 30 rows is 3.
    wanted = int(test_size) if test_size >= 1 else math.ceil(test_size * total - 1e-9)
    if wanted >= total:
        raise ValueError(f"test_size: expected fewer than all rows ({total:g}), got {wanted}")
    exact = [wanted * rows / total for rows in given]
    counts = [math.floor(rows) for rows in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda place: counts[place] - exact[place])
    for place in by_remainder[: wanted - sum(counts)]:
        counts[place] += 1
    return counts


def _limited(train: Sequence[np.ndarray], limit: int, seed: int) -> list[np.ndarray]:
    ends = np.cumsum([len(rows) for rows in train])
    kept = np.sort(np.random.default_rng(seed).permutation(ends[-1])[:limit])
    parts = np.split(kept, np.searchsorted(kept, ends[:-1]))
    starts = [0, *ends[:-1]]
    return [rows[part - start] for rows, part, start in zip(train, parts, starts, strict=True)]
