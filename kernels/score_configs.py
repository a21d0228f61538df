"""Tile shapes of the kernels that keep logits in registers: frozen tables, no search at run time.

Chosen by counting registers and shared memory, with Triton 3.6 and 3.9: no entry spills. None has
been measured on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.kernels.configs import architecture
from fastdaa.kernels.operands import fits_descriptor


class TileConfig(NamedTuple):
    """How a kernel cuts the rows, the vocabulary and the hidden size."""

    block_n: int
    """Rows of a tile."""
    block_v: int
    """Vocabulary entries of a tile."""
    block_d: int
    """Hidden entries of one step of the product."""
    num_warps: int
    num_stages: int
    """Steps of the product in flight."""
    tma: bool = False
    """Whether tiles are read through tensor descriptors."""
    maxnreg: int | None = None
    """Registers a thread at most. Where the assembler would spill a few to make room for a second
    program on a multiprocessor, a limit of 255 keeps it from trying."""
    parts: int = 1
    """Parts (1, 2 or 4) in which the columns of a tile are folded: more need fewer registers."""
    split_v: int = 2048
    """Vocabulary entries of one work item. Not a function of N: a row has the same bits in every
    batch."""
    group_n: int = 16
    """Row blocks that share the stream of the weight; their hidden states stay in L2."""
    programs: int = 1
    """Programs of the persistent grid on a multiprocessor. Where two fit, one computes products
    while the other folds its tile."""


_Key = tuple[int, bool, bool]
"""Architecture, whether operands have two bytes, and whether what happens to a logit is long:
statistics, the Jensen-Shannon divergence, or anything done to the product on its way there."""

_POINTERS = TileConfig(128, 128, 64, 8, 3, parts=2)
_FP32 = TileConfig(64, 64, 16, 8, 3, maxnreg=255)
# 214 registers at most, 230 with statistics: in fewer parts other versions of Triton would spill.
_WIDE = TileConfig(128, 256, 64, 8, 4, tma=True, parts=4)

# On one architecture, the columns of a part are as many with and without statistics: sums are then
# formed in the same order.
SCORE_CONFIGS: dict[_Key, TileConfig] = {
    (80, True, False): _POINTERS,
    (80, True, True): _POINTERS,
    (80, False, False): _FP32,
    (80, False, True): _FP32,
    (90, True, False): _WIDE,
    (90, True, True): _WIDE,
    (90, False, False): _FP32,
    (90, False, True): _FP32,
    (100, True, False): _WIDE,
    (100, True, True): _WIDE,
    (100, False, False): _FP32,
    (100, False, True): _FP32,
}
"""For ``score_tokens``."""

_TWO_POINTERS = TileConfig(64, 64, 64, 8, 3, group_n=8)
_TWO_FP32 = TileConfig(32, 64, 16, 4, 3, maxnreg=255, group_n=8)
_TWO_SQUARE = TileConfig(128, 128, 64, 8, 4, tma=True, parts=2, group_n=8)
_TWO_LONG = TileConfig(64, 128, 64, 8, 4, tma=True, parts=4, group_n=8)

DIVERGENCE_CONFIGS: dict[_Key, TileConfig] = {
    (80, True, False): _TWO_POINTERS,
    (80, True, True): _TWO_POINTERS,
    (80, False, False): _TWO_FP32,
    (80, False, True): _TWO_FP32,
    (90, True, False): _TWO_SQUARE,
    (90, True, True): _TWO_LONG,
    (90, False, False): _TWO_FP32,
    (90, False, True): _TWO_FP32,
    (100, True, False): _TWO_SQUARE,
    (100, True, True): _TWO_LONG,
    (100, False, False): _TWO_FP32,
    (100, False, True): _TWO_FP32,
}
"""For ``token_divergences``, with two accumulators a tile."""

ODD_ROWS: dict[bool, TileConfig] = {
    True: TileConfig(64, 64, 32, 8, 2, maxnreg=255),
    False: TileConfig(32, 32, 16, 4, 2, maxnreg=255),
}
"""By whether operands have two bytes, for rows that are read element by element, since they are no
multiple of 16 long or apart, or begin at such an address: larger tiles would spill. No model that
we know has such a hidden size."""

DIVERGENCE_FIELDS = 6
"""Numbers in the state of a row of a divergence."""


def state_bytes(vocab_size: int, fields: int) -> int:
    """Bytes of the states of a row, one for every work item along the vocabulary; all fp32."""
    configs = (*SCORE_CONFIGS.values(), *DIVERGENCE_CONFIGS.values(), *ODD_ROWS.values())
    return 4 * fields * -(-vocab_size // min(config.split_v for config in configs))


def tile_config(
    table: dict[_Key, TileConfig],
    long: bool,
    operands: tuple[Tensor, ...],
    config: TileConfig | None = None,
) -> TileConfig:
    """The entry for the operands' device and dtype, or ``config`` if given.

    Where the copy engine cannot read the operands (bases or rows that are not 16-byte aligned), an
    entry that reads through pointers; a given ``config`` then only loses its ``tma``.
    """
    half = operands[0].element_size() == 2
    aligned = all(fits_descriptor(tensor) for tensor in operands)
    if config is not None:
        return config._replace(tma=config.tma and aligned)
    config = table[_architecture(operands[0].device), half, long]
    if config.tma and aligned:
        return config
    # A base that is not aligned, a slice of a flat buffer say, is read element by element, too.
    if any(t.shape[1] % 16 or t.stride(0) % 16 or t.data_ptr() % 16 for t in operands):
        return ODD_ROWS[half]
    return table[80, half, long]


def _architecture(device: torch.device) -> int:
    """Compute capability 12 has neither ``tcgen05`` nor the shared memory of 10: it takes 80."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] > 10:
        return 80
    return architecture(device)
