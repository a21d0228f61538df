"""``fastdaa doctor --search-kernels``: which tile shapes are fastest on this device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdaa.kernels.search import Trial


def search_kernels(sizes: str) -> str:
    """Times the score kernel's candidates, a line each, and says which one is the fastest.

    Args:
        sizes: ``"N,V,D"``: tokens, vocabulary and hidden size of the problem.

    Returns:
        A line a kernel: the fastest, and the table's entry beside it.

    Raises:
        ValueError: sizes that are none, no CUDA device, or no candidate that works.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--search-kernels: expected a CUDA device, got none")
    from fastdaa.kernels.search import random_problem, search_sizes, searches

    problem = random_problem(*search_sizes(sizes), device=torch.device("cuda"))
    lines = []
    for name, trials in searches(*problem):
        print(f"{name}, N,V,D = {sizes}, {problem[0].dtype}; the first line is the table's entry")
        lines.append(f"{name}: {choose(trials)}")
    return "\n".join(lines)


def choose(trials: Iterable[Trial]) -> str:
    """Prints trials as they come and returns the line about the fastest.

    Raises:
        ValueError: none of them worked.
    """
    seen: list[Trial] = []
    for trial in trials:
        seen.append(trial)
        time = trial.problem if trial.milliseconds is None else f"{trial.milliseconds:.3f} ms"
        print(f"  {time:>10}  {trial.config}", flush=True)
    works = [trial for trial in seen if trial.milliseconds is not None]
    if not works:
        raise ValueError("--search-kernels: expected a configuration that works, got none")
    best = min(works, key=lambda trial: trial.milliseconds or 0.0)
    if best is seen[0]:
        return f"fastest: the table's entry, {best.milliseconds:.3f} ms"
    table = "does not work" if seen[0].milliseconds is None else f"{seen[0].milliseconds:.3f} ms"
    return f"fastest: {best.milliseconds:.3f} ms (the table's entry: {table}): {best.config}"
