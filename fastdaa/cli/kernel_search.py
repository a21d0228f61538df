"""``fastdaa doctor --search-kernels``: which tile shapes are fastest on this device."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdaa.kernels.search import Trial

_SECONDS = 140.0
"""For all searches: what is begun is finished, the comparison at the end comes on top."""


def search_kernels(sizes: str) -> str:
    """Times the candidates of every kernel that has a table, a line each, and compares the ways to
    scores, the best of them in turns with what is taken now.

    Args:
        sizes: ``"N,V,D"``: tokens, vocabulary and hidden size of the problem.

    Returns:
        A line a kernel: the fastest, and the table's entry beside it. Then times over those of the
        bare product, and what they recommend.

    Raises:
        ValueError: sizes that are none, no CUDA device, or one where engine ``triton`` fails.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--search-kernels: expected a CUDA device, got none")
    from fastdaa.cli.score_choice import choose_score
    from fastdaa.kernels.search import FUSED, TILES, random_problem, search_sizes, searches

    until = time.monotonic() + _SECONDS
    problem = random_problem(*search_sizes(sizes), device=torch.device("cuda"))
    lines: list[str] = []
    found: dict[str, list[Trial]] = {}
    for name, trials in searches(*problem):
        print(f"{name}, N,V,D = {sizes}, {problem[0].dtype}; the first line is the table's entry")
        found[name] = try_all(trials, until)
        lines.append(f"{name}: {fastest(found[name])}")
        print(f"  {fastest(found[name])}", flush=True)
    if found[TILES][0].milliseconds is None:
        raise ValueError(f"--search-kernels: engine triton fails here: {found[TILES][0].problem}")
    return "\n".join([*lines, "", *choose_score(problem, found[TILES], found[FUSED])])


def try_all(trials: Iterable[Trial], until: float) -> list[Trial]:
    """Prints trials as they come, the first whatever the time; no further one begins after
    ``until``, by ``time.monotonic``."""
    seen: list[Trial] = []
    for trial in trials:
        seen.append(trial)
        said = trial.problem if trial.milliseconds is None else f"{trial.milliseconds:.3f} ms"
        print(f"  {said:>10}  {trial.config}", flush=True)
        if time.monotonic() > until:
            print("  the time is up: what is left is not tried", flush=True)
            break
    return seen


def fastest(seen: list[Trial]) -> str:
    """A line about the fastest of trials; the first is the table's entry."""
    works = [trial for trial in seen if trial.milliseconds is not None]
    if not works:
        return "nothing works"
    best = min(works, key=lambda trial: trial.milliseconds or 0.0)
    if best is seen[0]:
        return f"fastest: the table's entry, {best.milliseconds:.3f} ms"
    table = "does not work" if seen[0].milliseconds is None else f"{seen[0].milliseconds:.3f} ms"
    return f"fastest: {best.milliseconds:.3f} ms (the table's entry: {table}): {best.config}"
