"""Scored completions as pairs with advantages, for offline APA and AWR.

Records ``{"prompt", "completion", "score"}`` of one prompt belong together. The advantage of a
completion is its score less the mean of its prompt's scores. The best is paired with the worst, the
second best with the second worst, and so on, so that each is used once and a pair shares its
prompt. Left out are the median one of an odd number, and prompts with a single completion, which
says nothing about what is better.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from fastdaa.counted import counted
from fastdaa.data.errors import BadRow, bad_field, describe
from fastdaa.data.fields import ADVANTAGE_FIELDS
from fastdaa.data.readers import Place, Records

logger = logging.getLogger(__name__)
SCORED_FIELDS = ("prompt", "completion", "score")


class _Scored(NamedTuple):
    place: Place
    record: Mapping[str, Any]
    score: float


def pair_scored(records: Records) -> Records:
    """The same records, or pairs with advantages if the first one is a scored completion."""
    stream = iter(records)
    first = next(stream, None)
    if first is None:
        return iter(())
    whole = chain([first], stream)
    record = first[1]
    scored = isinstance(record, Mapping) and "score" in record and "completion" in record
    return _pairs(whole) if scored and "chosen" not in record else whole


def _pairs(records: Records) -> Iterator[tuple[Place, Any]]:
    groups: dict[str, list[_Scored]] = {}
    for place, record in records:
        try:
            scored = _Scored(place, record, _score(record))
        except BadRow as problem:
            yield place, problem
            continue
        key = json.dumps(record["prompt"], sort_keys=True, default=str)
        groups.setdefault(key, []).append(scored)
    left_out = 0
    for group in groups.values():
        ordered = sorted(group, key=lambda item: item.score, reverse=True)
        mean = math.fsum(item.score for item in group) / len(group)
        half = len(ordered) // 2
        left_out += len(ordered) - 2 * half
        for better, worse in zip(ordered[:half], ordered[::-1][:half], strict=True):
            yield better.place, _pair(better, worse, mean)
    if left_out:
        logger.warning(
            "%d of %s left out: the only one of their prompt, or the middle one of an odd number.",
            left_out,
            counted(sum(map(len, groups.values())), "scored completion"),
        )


def _pair(better: _Scored, worse: _Scored, mean: float) -> dict[str, Any]:
    sides = {"chosen": better.record["completion"], "rejected": worse.record["completion"]}
    advantages = dict(zip(ADVANTAGE_FIELDS, (better.score - mean, worse.score - mean), strict=True))
    rest = {k: v for k, v in better.record.items() if k not in SCORED_FIELDS}
    return {**rest, "prompt": better.record["prompt"], **sides, **advantages}


def _score(record: Any) -> float:
    if isinstance(record, BadRow):
        raise record
    for field in SCORED_FIELDS:
        if not isinstance(record, Mapping) or record.get(field) is None:
            raise bad_field("missing field", field, "a value as in the first row", "none")
    score = record["score"]
    if isinstance(score, str):
        with contextlib.suppress(ValueError):  # CSV holds text
            score = float(score)
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise bad_field("score", "score", "a finite number", describe(record["score"]))
    return float(score)
