"""Time and memory of candidates that take turns in one process.

Taking turns lets everyone meet the same machine: a slow second hits one run of everyone, not all
runs of one. CUDA times are those of events on the current stream; CPU times are wall-clock.
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch

MIN_ROUNDS = 3
# A full collection walks through every object of every imported library; what is left over from a
# run is young.
_YOUNG = 1
T = TypeVar("T")


def interleave(
    runs: Mapping[str, Callable[[], object]],
    device: str,
    *,
    repeats: int = 20,
    budget: float | None = None,
    warmup: int = 1,
    seed: int = 0,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every run of every candidate, one list entry a round, warm-up rounds left out.

    Args:
        runs: candidates; what they return is dropped before the next one starts.
        repeats: timed rounds, if the budget allows.
        budget: seconds after which no further round begins, but for the first three.
        warmup: rounds before them, not counted against the budget.
        seed: of the order of the candidates, which changes from round to round.
        on_round: called with the number of finished rounds.

    Raises:
        ValueError: fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    order = list(runs)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmup):
        for name in order:
            time_once(runs[name], device)
    collecting = gc.isenabled()
    gc.collect(_YOUNG)
    gc.disable()
    try:
        began = time.perf_counter()
        for done in range(repeats):
            spent = time.perf_counter() - began
            if budget is not None and done >= MIN_ROUNDS and spent * (done + 1) / done > budget:
                break
            shuffle(order)
            for name in order:
                times[name].append(time_once(runs[name], device))
            gc.collect(_YOUNG)
            if on_round is not None:
                on_round(done + 1)
    finally:
        if collecting:
            gc.enable()
    return times


# Cycles that a device is kept busy before a call that is timed: about a millisecond.
_HEAD_START = 2_000_000


def time_once(run: Callable[[], object], device: str) -> float:
    """Seconds of one run."""
    if device != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # The host prepares the call meanwhile, as it does while a model's layers run.
    torch.cuda._sleep(_HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def summary(times: Iterable[float]) -> dict[str, float | int]:
    """``median``, ``p10``, ``p90`` (linear between ranks), ``min`` and ``n`` of some seconds."""
    ordered = sorted(times)

    def quantile(q: float) -> float:
        place = q * (len(ordered) - 1)
        low, high = math.floor(place), math.ceil(place)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {
        "median": quantile(0.5), "p10": quantile(0.1), "p90": quantile(0.9),
        "min": ordered[0], "n": len(ordered),
    }  # fmt: skip


def measure_peak(run: Callable[[], T], device: str) -> tuple[T, int]:
    """What a run returned, and the most bytes that were allocated at a time beyond those before.

    CUDA: the caching allocator's statistics. CPU: every allocation of PyTorch's allocator as the
    profiler reports it, so the same for every run and every machine; it holds the temporaries
    inside operators but not the scratch of BLAS and oneDNN, and pages that are never touched count.
    """
    gc.collect(_YOUNG)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    # Read when the profiler starts: without it, every start and stop is a line on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = run()
    return result, _highest(profile.kineto_results.events())


def _highest(events: Iterable[Any]) -> int:
    memory = [event for event in events if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
