"""Launch configurations: frozen tables by kernel and architecture, no search at run time.

The entries are chosen from registers and bytes in flight (``fastdaa doctor --kernels`` prints the
first), not from timings: none has been measured on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities (times ten) that have a table; others use the next lower one."""


SPLIT_V = 12544
"""Vocabulary entries of a program that takes statistics."""


class RowConfig(NamedTuple):
    """Block sizes of a kernel that goes over rows of a tile of logits."""

    block_v: int
    """Vocabulary entries at a time."""
    num_warps: int
    block_n: int = 1
    """Rows at a time."""
    split_v: int = SPLIT_V
    """Vocabulary entries of a program that takes statistics. Tiles of logits hold any number of
    whole splits, so a row has the same bits in every tile."""


# 2048 entries for 8 warps are 8 a thread: with the running sums of the widest variant that leaves
# room for three or four programs on a multiprocessor, each with 8 KiB in flight.
ROW_CONFIGS: dict[str, dict[int, RowConfig]] = {
    "row_statistics": {
        80: RowConfig(2048, 8),
        90: RowConfig(2048, 8),
        100: RowConfig(2048, 8),
    },
    "row_gradient": {
        80: RowConfig(2048, 8),
        90: RowConfig(2048, 8),
        100: RowConfig(2048, 8),
    },
    "hidden_rows": {
        80: RowConfig(1024, 4),
        90: RowConfig(1024, 4),
        100: RowConfig(1024, 4),
    },
    # 8 rows of 512 entries for 4 warps are 32 a thread, 4 loads of 16 bytes in bf16.
    "target_rows": {
        80: RowConfig(512, 4, block_n=8),
        90: RowConfig(512, 4, block_n=8),
        100: RowConfig(512, 4, block_n=8),
    },
    "column_sums": {
        80: RowConfig(128, 4, block_n=32),
        90: RowConfig(128, 4, block_n=32),
        100: RowConfig(128, 4, block_n=32),
    },
}


@triton.jit
def _probe_kernel():
    """Nothing; its class says what ``triton.jit`` makes here."""


def interpreted() -> bool:
    """Whether Triton was imported under its interpreter, which runs kernels on CPU tensors."""
    return not isinstance(_probe_kernel, triton.JITFunction)


def architecture(device: torch.device) -> int:
    """The entry of ``ARCHITECTURES`` that serves a device; the first for CPU tensors."""
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor), default=ARCHITECTURES[0])


def row_config(kernel: str, device: torch.device) -> RowConfig:
    """The configuration of a row kernel on a device."""
    return ROW_CONFIGS[kernel][architecture(device)]
