"""Which way to scores is the fastest on this device, and how to have it.

Candidates of a search are timed one after another, while clocks fall as the device gets warm. The
best of them are timed again here in turns, beside the bare product and what is taken now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from fastdaa.kernels.search import Trial
    from fastdaa.kernels.search_tiles import ProductConfig

    Problem = tuple[Tensor, Tensor, Tensor]

_MOST_BYTES = 60 << 20
"""Of tiles: ``score`` is to take 64 MiB at most."""
_WORTH = 0.99
"""A change of less than a hundredth of the time is not worth a table's edit."""
_ROUNDS, _SECONDS = 15, 25.0
# Of the bare product's tiles of results, whose rows are a multiple of what products are cut into.
_PRODUCT_BYTES, _ROW_MULTIPLE = 2 << 30, 128


class Way(NamedTuple):
    """One way to scores, or a part of the work."""

    name: str
    run: Callable[[], object]
    how: str | None = None
    """How to have it: ``""`` for what is taken now, None for what the library cannot do yet, and
    for what is no way to scores."""


def choose_score(
    problem: Problem, tiles: Sequence[Trial], fused: Sequence[Trial], device: str = "cuda"
) -> list[str]:
    """Lines with the time of every way in turns, and one that recommends.

    Args:
        problem: hidden states ``[N, D]``, weight ``[V, D]``, targets ``[N]``.
        tiles, fused: what the two searches found.
        device: ``"cuda"``, or ``"cpu"`` for the interpreter.
    """
    from fastdaa.benchmarks.measure import interleave, summary

    found = ways(problem, tiles, fused)
    times = interleave({w.name: w.run for w in found}, device, repeats=_ROUNDS, budget=_SECONDS)
    medians = [float(summary(times[way.name])["median"]) for way in found]
    floor = medians[0]
    lines = [
        f"  {1e3 * seconds:9.3f} ms  {seconds / floor:5.2f} x 1U  {way.name}"
        for way, seconds in zip(found, medians, strict=True)
    ]
    rounds = len(times[found[0].name])
    return [f"score, the median of {rounds} rounds in turns:", *lines, *advise(found, medians)]


def ways(problem: Problem, tiles: Sequence[Trial], fused: Sequence[Trial]) -> list[Way]:
    """The bare product, a part of the work, what is taken now, and the best that was found."""
    hidden, weight, targets = problem
    from fastdaa.head import LmHead
    from fastdaa.kernels.score import score_tokens
    from fastdaa.kernels.score_configs import TileConfig
    from fastdaa.kernels.search_tiles import (
        ProductConfig,
        multiply_tiles,
        multiply_whole,
        score_through_tiles,
    )
    from fastdaa.logps import head_logps

    most = max(_PRODUCT_BYTES // (hidden.element_size() * len(weight)), 1)
    rows = min(most // _ROW_MULTIPLE * _ROW_MULTIPLE or most, len(hidden))
    out = hidden.new_empty((rows, len(weight)))
    now = tiles[0].config
    assert isinstance(now, ProductConfig)

    engine = partial(head_logps, hidden, LmHead(weight), targets, impl="score")
    found = [
        Way("the bare product, 1U", partial(multiply_whole, hidden, weight, out)),
        Way(f"products of {_words(now)} alone, fp32", partial(multiply_tiles, hidden, weight, now)),
        Way("engine triton, taken by auto", partial(engine, engine="triton"), ""),
    ]
    if fused[0].milliseconds is not None:
        found.append(Way("engine fused", partial(engine, engine="fused"), 'ask for engine="fused"'))
    for config, how in _best_tiles(tiles):
        through = partial(score_through_tiles, *problem, config)
        found.append(Way(_words(config), through, how))
    best = min(_works(fused), key=lambda t: t.milliseconds or 0.0, default=None)
    if best is not None and best.config != fused[0].config:
        assert isinstance(best.config, TileConfig)
        kernel = partial(score_tokens, *problem, config=best.config)
        how = (
            "make it the entry of this architecture in SCORE_CONFIGS (kernels/score_configs.py), "
            'and ask for engine="fused"'
        )
        found.append(Way(f"engine fused with {best.config}", kernel, how))
    return found


def _works(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.milliseconds is not None]


def _best_tiles(trials: Sequence[Trial]) -> Iterator[tuple[ProductConfig, str | None]]:
    """The fastest one that the library can take, and any that is faster; not that of now."""
    from fastdaa.kernels.search_tiles import ProductConfig

    ranked = sorted(_works(trials), key=lambda trial: trial.milliseconds or 0.0)
    assert isinstance(trials[0].config, ProductConfig)
    most_rows = trials[0].config.rows
    for trial in ranked:
        config = trial.config
        assert isinstance(config, ProductConfig)
        # Other paths' blocks have no more rows, and a token is to have the same bits on all.
        ours = config.lanes == 1 and config.held <= _MOST_BYTES and config.rows <= most_rows
        if trial is trials[0]:
            return
        if ours:
            yield config, _constants(config)
            return
        if trial is ranked[0]:
            yield config, None


def _constants(config: ProductConfig) -> str:
    return (
        f"set SPLIT_V = {config.columns} in kernels/configs.py, STATISTICS_ROWS = {config.rows} "
        f"and STATISTICS_BYTES = 4 * {config.rows} * {config.columns} in fastdaa/slices.py, then "
        "`make gpu-check BENCH_FLAGS='--only paths'`: all paths take statistics of such tiles"
    )


def _words(config: ProductConfig) -> str:
    streams = "" if config.lanes == 1 else f" on {config.lanes} streams"
    return f"tiles of {config.rows} x {config.columns}{streams}, {config.held >> 20} MiB"


def advise(found: Sequence[Way], medians: Sequence[float]) -> list[str]:
    """What the times recommend: one line, and one about what the library cannot do yet.

    Args:
        found: ways whose first is the bare product, whose second is products alone, and of which
            one is taken now.
        medians: their times, in any unit.
    """
    floor, alone = medians[:2]
    timed = list(zip(found[2:], medians[2:], strict=True))
    now = next(seconds for way, seconds in timed if way.how == "")
    way, best = min(
        ((way, seconds) for way, seconds in timed if way.how is not None), key=lambda each: each[1]
    )
    said = f"now {now / floor:.2f} x 1U, of which products alone {alone / floor:.2f}"
    if best > _WORTH * now:
        lines = [f"recommended: nothing to change ({said}; others gain less than 1 %)"]
        best = now
    else:
        lines = [
            f"recommended: {way.name}, {best / floor:.2f} x 1U ({said}): {way.how}",
        ]
    beyond = [(other, seconds) for other, seconds in timed if other.how is None]
    for other, seconds in beyond:
        if seconds <= _WORTH * best:
            lines.append(
                f"beyond that: {other.name}, {seconds / floor:.2f} x 1U, which no engine does yet "
                "(two streams, more than 64 MiB, or more rows than blocks of other paths have); "
                "score_through_tiles in kernels/search_tiles.py shows how"
            )
    return lines
