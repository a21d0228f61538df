"""The floor: the head's matrix products by themselves, in the dtype of the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.inputs import HeadInputs

_TILE_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}
# Of a tile's rows: what products are cut into themselves.
_ROW_MULTIPLE = 128
FORWARD, HIDDEN, WEIGHT = "product-forward", "product-hidden", "product-weight"


def products(inputs: HeadInputs) -> dict[str, Callable[[], Tensor]]:
    """Logits, gradient of the hidden states, and gradient of the weight, 1U each.

    Tiles are the fewest of equal height that fit 2 GiB of logits (CPU: 512 MiB): a floor has to be
    as fast as products can be. Results go into memory that is there already, in the dtype of the
    inputs.
    """
    case, hidden, weight = inputs.case, inputs.hidden.detach(), inputs.weight.detach()
    row = case.vocab * hidden.element_size()
    size = tile_rows(case.tokens, max(_TILE_BYTES[inputs.device.type] // row, 1))
    rows = [slice(i, min(i + size, case.tokens)) for i in range(0, case.tokens, size)]
    tile = torch.zeros(size, case.vocab, dtype=hidden.dtype, device=inputs.device)

    def forward() -> Tensor:
        for r in rows:
            torch.mm(hidden[r], weight.T, out=tile[: r.stop - r.start])
        return tile

    runs = {FORWARD: forward}
    if case.wants_grad:
        dh = torch.empty_like(hidden)

        def gradient_of_hidden() -> Tensor:
            for r in rows:
                torch.mm(tile[: r.stop - r.start], weight, out=dh[r])
            return dh

        runs[HIDDEN] = gradient_of_hidden
    if case.wants_head_grad:
        dw = torch.zeros_like(weight)

        def gradient_of_weight() -> Tensor:
            for r in rows:
                # beta = 0 overwrites, so the first tile needs no zeros.
                torch.addmm(dw, tile[: r.stop - r.start].T, hidden[r], beta=r.start and 1, out=dw)
            return dw

        runs[WEIGHT] = gradient_of_weight
    return runs


def tile_rows(tokens: int, most: int) -> int:
    """Rows of the fewest equal tiles of at most ``most`` rows, a multiple of 128 where it fits."""
    equal = math.ceil(tokens / math.ceil(tokens / most))
    whole = math.ceil(equal / _ROW_MULTIPLE) * _ROW_MULTIPLE
    return min(whole if whole <= most else equal, tokens)


def floor_times(gemms: int, times: Mapping[str, list[float]]) -> list[float]:
    """Seconds of ``gemms`` products, round by round: each gradient once, logits for the rest."""
    gradients = [times[name] for name in (HIDDEN, WEIGHT) if name in times]
    again = gemms - len(gradients)
    return [
        again * first + sum(rest) for first, *rest in zip(times[FORWARD], *gradients, strict=True)
    ]


def floor_sizes(case: Case) -> range:
    """Products of the floors that get a row: from the fewest that give the result, to those that
    recompute the logits."""
    fewest = 1 + case.wants_grad + case.wants_head_grad
    return range(1, fewest + 1 + case.wants_grad)
