"""Search for tile shapes on the device at hand: asked for, never at run time.

The tables of ``score_configs`` and ``configs`` are frozen, so that a run has the same bits today
and tomorrow. This times other entries for one problem, checks that they give the same values, and
says which is the fastest; putting it into the table is an edit with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastdaa.kernels.configs import RowConfig, row_config
from fastdaa.kernels.row_gradient import write_row_gradient
from fastdaa.kernels.row_statistics import take_row_statistics
from fastdaa.kernels.score import score_tokens
from fastdaa.kernels.score_configs import SCORE_CONFIGS, TileConfig, tile_config
from fastdaa.kernels.search_tiles import ProductConfig, product_candidates, score_through_tiles

Timer = Callable[[Callable[[], object]], float]
"""Milliseconds that a call takes on the device."""

TILES, FUSED = "score through tiles", "score"
"""The searches for the two ways to scores: engine ``triton`` is the first, ``fused`` the second."""

# A different tile adds in another order; more than this in nats is a wrong result.
_TOLERANCE = 1e-3
# Bytes of fp32 logits that the row kernels are timed on: far more than a cache holds.
_LOGITS_BYTES = 512 << 20


class Trial(NamedTuple):
    """One configuration and what became of it."""

    config: TileConfig | RowConfig | ProductConfig
    milliseconds: float | None
    """None if it does not run or is wrong."""
    problem: str = ""
    """Why, then."""


class _Shape(NamedTuple):
    """Fields of :class:`TileConfig` that are changed together."""

    block_n: int
    block_v: int
    num_warps: int
    num_stages: int
    parts: int
    maxnreg: int | None = None
    programs: int = 1


# By whether operands have two bytes. Two programs on a multiprocessor read a third more from L2
# than one large tile does, and fold their tiles while the other multiplies.
_SHAPES = {
    True: (
        _Shape(128, 256, 8, 4, 4), _Shape(128, 256, 8, 3, 4), _Shape(128, 256, 8, 4, 2),
        _Shape(256, 128, 8, 4, 2), _Shape(64, 256, 4, 4, 2),
        _Shape(128, 128, 4, 3, 4, None, 2), _Shape(128, 128, 8, 3, 2, 128, 2),
        _Shape(64, 128, 4, 4, 2, None, 2),
    ),
    False: (
        _Shape(64, 64, 8, 3, 1, 255), _Shape(64, 64, 4, 3, 1, 255), _Shape(64, 128, 8, 3, 2, 255),
        _Shape(128, 64, 8, 3, 1, 255), _Shape(64, 64, 8, 2, 1, 128, 2),
        _Shape(32, 64, 4, 3, 1, 128, 4), _Shape(64, 64, 8, 4, 1, 255),
    ),
}  # fmt: skip
_GROUPS = (8, 16, 32)


def score_candidates(table_entry: TileConfig, half: bool) -> Iterator[TileConfig]:
    """The table's entry, and other tiles for operands of two bytes (``half``) or four.

    Each is compiled, which takes seconds: shapes and groups are not all combined.
    """
    others = [table_entry._replace(**shape._asdict()) for shape in _SHAPES[half]]
    others += [table_entry._replace(group_n=group) for group in _GROUPS]
    yield from dict.fromkeys([table_entry, *others])


def row_candidates(table_entry: RowConfig) -> Iterator[RowConfig]:
    """The table's entry, and others with 4 to 32 entries a thread."""
    yield table_entry
    for block_v, warps in product((1024, 2048, 4096, 8192), (4, 8, 16, 32)):
        config = table_entry._replace(block_v=block_v, num_warps=warps)
        if config != table_entry and 4 <= block_v // (32 * warps) <= 32:
            yield config


def searches(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, timer: Timer | None = None
) -> Iterator[tuple[str, Iterator[Trial]]]:
    """Every search that there is for a problem ``[N, D]``, ``[V, D]``, ``[N]``, with its name.

    What decides about ``score`` comes first, for a caller whose time is short.
    """
    problem = (hidden_states, weight, targets)
    yield TILES, search_products(*problem, timer=timer)
    yield FUSED, search_score(*problem, timer=timer)
    rows = max(min(len(targets), _LOGITS_BYTES // (4 * len(weight))), 1)
    z = hidden_states[:rows].float() @ weight.float().T
    yield "row_statistics", search_row_statistics(z, targets[:rows], timer=timer)
    yield "row_gradient", search_row_gradient(z, targets[:rows], hidden_states.dtype, timer=timer)
    del z
    yield "score with statistics", search_score(*problem, stats=True, timer=timer)


def search_score(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    stats: bool = False,
    candidates: Iterable[TileConfig] | None = None,
    timer: Timer | None = None,
) -> Iterator[Trial]:
    """Time ``score_tokens`` with every candidate, one after another.

    Args:
        hidden_states: ``[N, D]``. weight: ``[V, D]``. targets: ``[N]`` int64; on a CUDA device.
        stats: with the four statistics.
        candidates: what to try; None for :func:`score_candidates` around the table's entry.
        timer: None for the median of Triton's ``do_bench`` over 200 ms.

    Yields:
        A trial as soon as it is timed, so that the caller can show it and stop at any time.
    """
    entry = tile_config(SCORE_CONFIGS, stats, (hidden_states, weight))
    if candidates is None:
        candidates = score_candidates(entry, hidden_states.element_size() == 2)

    def run(config: TileConfig) -> Tensor:
        return score_tokens(hidden_states, weight, targets, stats=stats, config=config).logps

    return _trials(run, candidates, timer)


def search_products(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, *, timer: Timer | None = None
) -> Iterator[Trial]:
    """Time the other way to scores, products of tiles and statistics of each."""

    def run(config: ProductConfig) -> Tensor:
        return score_through_tiles(hidden_states, weight, targets, config)

    return _trials(run, product_candidates(), timer)


def search_row_statistics(
    z: Tensor, targets: Tensor, *, timer: Timer | None = None
) -> Iterator[Trial]:
    """Time ``take_row_statistics`` of logits ``[r, V]``, as :func:`search_score` does."""
    entry = row_config("row_statistics", z.device)

    def run(config: RowConfig) -> Tensor:
        return take_row_statistics(z, targets, config=config).logps

    return _trials(run, row_candidates(entry), timer)


def search_row_gradient(
    z: Tensor, targets: Tensor, dtype: torch.dtype, *, timer: Timer | None = None
) -> Iterator[Trial]:
    """Time ``write_row_gradient`` of logits ``[r, V]`` into a tensor of ``dtype``."""
    entry, state = row_config("row_gradient", z.device), take_row_statistics(z, targets)[:3]
    out, ones = torch.empty(z.shape, dtype=dtype, device=z.device), torch.ones_like(state[0])

    def run(config: RowConfig) -> Tensor:
        return write_row_gradient(z, targets, *state, ones, dtype=dtype, out=out, config=config)

    return _trials(run, row_candidates(entry), timer)


def _trials(run, candidates, timer) -> Iterator[Trial]:  # type: ignore[no-untyped-def]
    """The first that runs, the table's entry unless that fails, is what others are held to."""
    timer, want = timer or _bench, None
    for config in candidates:
        try:
            got = run(config).clone()
            want = got if want is None else want
            error = float((got - want).abs().max())
            if error < _TOLERANCE:
                yield Trial(config, timer(partial(run, config)))
            else:
                yield Trial(config, None, f"wrong: results differ by {error:.1e}")
        except Exception as failure:  # compilers raise what they like; the others still may run
            said = str(failure).strip() or type(failure).__name__
            yield Trial(config, None, said.splitlines()[0][:200])


def _bench(run: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median"))


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
