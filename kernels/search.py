"""Search for tile shapes on the device at hand: asked for, never at run time.

The tables of ``score_configs`` are frozen, so that a run has the same bits today and tomorrow. This
times other entries for one problem, checks that they give the same values, and says which is the
fastest; putting it into the table is an edit with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastdaa.kernels.score import score_tokens
from fastdaa.kernels.score_configs import SCORE_CONFIGS, TileConfig, tile_config

Timer = Callable[[Callable[[], object]], float]
"""Milliseconds that a call takes on the device."""

# A different tile adds in another order; more than this in nats is a wrong result.
_TOLERANCE = 1e-3


class Trial(NamedTuple):
    """One configuration and what became of it."""

    config: TileConfig
    milliseconds: float | None
    """None if it does not run or is wrong."""
    problem: str = ""
    """Why, then."""


def score_candidates(table_entry: TileConfig) -> Iterator[TileConfig]:
    """The table's entry, and around it other tiles, warps, stages and groups."""
    yield table_entry
    for (block_n, block_v), warps, stages, group in product(
        ((64, 128), (64, 256), (128, 128), (128, 256)), (4, 8), (3, 4), (8, 16, 32)
    ):
        config = table_entry._replace(
            block_n=block_n, block_v=block_v, num_warps=warps, num_stages=stages, group_n=group
        )
        if config != table_entry:
            yield config


def search_score(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    candidates: Iterable[TileConfig] | None = None,
    timer: Timer | None = None,
) -> Iterator[Trial]:
    """Time ``score_tokens`` with every candidate, one after another.

    Args:
        hidden_states: ``[N, D]``. weight: ``[V, D]``. targets: ``[N]`` int64; on a CUDA device.
        candidates: what to try; None for :func:`score_candidates` around the table's entry.
        timer: None for the median of Triton's ``do_bench`` over 300 ms.

    Yields:
        A trial as soon as it is timed, so that the caller can show it and stop at any time.
    """
    timer = timer or _bench
    entry = tile_config(SCORE_CONFIGS, False, (hidden_states, weight))
    want = score_tokens(hidden_states, weight, targets, config=entry).logps
    for config in score_candidates(entry) if candidates is None else candidates:
        yield _try(config, hidden_states, weight, targets, want, timer)


def _try(
    config: TileConfig, hidden_states: Tensor, weight: Tensor, targets: Tensor, want: Tensor,
    timer: Timer,
) -> Trial:  # fmt: skip
    def run() -> Tensor:
        return score_tokens(hidden_states, weight, targets, config=config).logps

    try:
        error = float((run() - want).abs().max())
    except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError) as failure:
        return Trial(config, None, str(failure).splitlines()[0])
    if not error < _TOLERANCE:
        return Trial(config, None, f"wrong: log-probs differ by {error:.1e} nat")
    return Trial(config, timer(run))


def _bench(run: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(run, warmup=100, rep=300, return_mode="median"))


def search_sizes(text: str) -> tuple[int, int, int]:
    """``"N,V,D"`` as numbers. Raises ``ValueError`` for anything else."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"expected N,V,D as three numbers above 0, got {text!r}")
    n, v, d = (int(part) for part in parts)
    return n, v, d


def random_problem(n: int, v: int, d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 hidden states ``[n, d]``, weight ``[v, d]`` and targets ``[n]`` with a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden_states = torch.randn(n, d, generator=generator, device=device).to(dtype)
    weight = torch.randn(v, d, generator=generator, device=device).mul_(d**-0.5).to(dtype)
    targets = torch.randint(0, v, (n,), generator=generator, device=device)
    return hidden_states, weight, targets
