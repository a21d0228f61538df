"""How high and wide the products are whose statistics are taken: a search, as :mod:`search`.

Statistics of logits, 1U, are products of tiles and one read of each. A tile that stays in the
cache until it is read costs no memory traffic; one that fills the multiprocessors a whole number of
times wastes none of them; and two tiles at a time, each on a stream of its own, hide the end of one
behind the other. These pull in different directions, and only a device can say which one wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.kernels.configs import SPLIT_V, row_config
from fastdaa.kernels.merge_splits import merge_splits
from fastdaa.kernels.row_statistics import take_row_states


class ProductConfig(NamedTuple):
    """Tiles of logits whose statistics are taken."""

    rows: int
    columns: int
    """Vocabulary entries of a tile, and of a program that takes statistics."""
    lanes: int = 1
    """Tiles in memory at a time, each on its own stream."""

    @property
    def held(self) -> int:
        """Bytes of these tiles."""
        return 4 * self.rows * self.columns * self.lanes


def product_candidates() -> Iterator[ProductConfig]:
    """What the planner takes with 8192 tokens, and tiles of 8 to 98 MiB."""
    yield ProductConfig(1024, SPLIT_V)
    # 132 multiprocessors of an H200 work on tiles of 128 x 256: 1024 x 4224 are one wave of them.
    # Two tiles of 1024 x 6272 take what one of the planner's does; together they need no waves.
    for columns in (4224, 6272, 8448, 12544, 16896):
        for rows in (512, 1024, 2048):
            for lanes in (1, 2):
                config = ProductConfig(rows, columns, lanes)
                if config != (1024, SPLIT_V, 1) and config.held <= 100 << 20:
                    yield config


def score_through_tiles(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, config: ProductConfig
) -> Tensor:
    """Log-probs ``[N]`` by products of tiles and statistics of each."""
    (n, _), v = hidden_states.shape, weight.shape[0]
    device, entry = hidden_states.device, row_config("row_statistics", hidden_states.device)
    rows_config = entry._replace(split_v=config.columns)
    streams = _streams(device, config.lanes)
    buffers = [torch.empty(config.rows, config.columns, device=device) for _ in range(config.lanes)]
    states: dict[int, list[Tensor]] = {start: [] for start in range(0, n, config.rows)}
    tiles = [(start, first) for start in states for first in range(0, v, config.columns)]
    for i, (start, first) in enumerate(tiles):
        lane = i % config.lanes
        hidden = hidden_states[start : start + config.rows]
        columns = weight[first : first + config.columns]
        z = buffers[lane][: hidden.shape[0], : columns.shape[0]]
        with _on(streams[lane]):
            _multiply(hidden, columns, z)
            states[start].append(
                take_row_states(
                    z, targets[start : start + config.rows], first_column=first,
                    config=rows_config,
                )
            )  # fmt: skip
    for stream in streams[1:]:
        torch.cuda.current_stream(device).wait_stream(stream)
    return torch.cat(
        [
            merge_splits(torch.cat(parts), targets[start : start + config.rows], v).logps
            for start, parts in states.items()
        ]
    )


def multiply_tiles(hidden_states: Tensor, weight: Tensor, config: ProductConfig) -> None:
    """The same products on one stream and nothing else: statistics and waits come on top."""
    buffer = torch.empty(config.rows, config.columns, device=hidden_states.device)
    for start in range(0, hidden_states.shape[0], config.rows):
        hidden = hidden_states[start : start + config.rows]
        for first in range(0, weight.shape[0], config.columns):
            columns = weight[first : first + config.columns]
            _multiply(hidden, columns, buffer[: hidden.shape[0], : columns.shape[0]])


def multiply_whole(hidden_states: Tensor, weight: Tensor, out: Tensor) -> None:
    """The bare products ``[N, V]`` in the dtype of the factors, ``out [r, V]`` at a time: 1U."""
    for start in range(0, hidden_states.shape[0], out.shape[0]):
        hidden = hidden_states[start : start + out.shape[0]]
        torch.mm(hidden, weight.T, out=out[: hidden.shape[0]])


def _multiply(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)


def _streams(device: torch.device, lanes: int) -> list[Any]:
    """The current stream and others that begin where it is."""
    if device.type != "cuda":
        if lanes > 1:
            raise RuntimeError(f"{lanes} streams: expected a CUDA device, got {device}")
        return [None]
    current, others = torch.cuda.current_stream(device), _side_streams(device, lanes - 1)
    for stream in others:
        stream.wait_stream(current)
    return [current, *others]


@cache
def _side_streams(device: torch.device, count: int) -> tuple[Any, ...]:
    """The same in every call: a library allocates its workspace anew for each stream that it meets,
    in the middle of what is timed."""
    return tuple(torch.cuda.Stream(device) for _ in range(count))


def _on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
