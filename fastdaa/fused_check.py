"""Whether a kernel that keeps logits in registers works on the GPU at hand, when it is first used.

``engine="fused"`` is asked for by name, so nothing may take its place. The first call of every
variant compares a few of its rows with plain torch, and raises where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from fastdaa.engine_check import free_to_wait

_ROWS = 8
# Of a value or of the logits that it comes from: fp32 products and sums in another order, also
# where PyTorch's own are in TF32, are less than this apart, and wrong code is not.
_LIMIT = 2e-3
_SEEN: set[Hashable] = set()


def is_due(device: torch.device, variant: Hashable) -> bool:
    """Whether this variant has not been checked on a CUDA device yet."""
    if device.type != "cuda" or detect_fake_mode() is not None:
        return False
    return (device, variant) not in _SEEN and not torch.cuda.is_current_stream_capturing()


def check_rows(
    device: torch.device,
    variant: Hashable,
    values: dict[str, Tensor],
    plain: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]],
) -> None:
    """Compare some rows of what a kernel gave with what plain torch gives, once a variant.

    Args:
        variant: what makes other machine code.
        values: ``[n]`` by name, at least one row.
        plain: from positions ``[r]`` to the same of these rows, and the largest of their logits
            ``[r]``; rows in which that is not finite are not compared.

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    if not is_due(device, variant):
        return
    rows = next(iter(values.values())).shape[0]
    with free_to_wait():
        picked = torch.linspace(0, rows - 1, min(rows, _ROWS), device=device).long()
        expected, largest = plain(picked)
        for name, value in values.items():
            # Log-probs of a target far below the largest logit are as far from exact as its own.
            size = expected[name].nan_to_num(0.0, 0.0, 0.0).abs()
            limit = _LIMIT * (1.0 + largest.abs().maximum(size))
            gap = (value[picked] - expected[name]).abs()
            ends = value[picked].isfinite() == expected[name].isfinite()
            wrong = ((gap > limit) | ~ends) & limit.isfinite()
            if bool(wrong.any()):
                where, gap = torch.cuda.get_device_name(device), gap[wrong].max()
                raise RuntimeError(
                    f"engine='fused': expected {name} as plain torch gives them, got some that are "
                    f"off by up to {gap.item():.3g} on {where}; use engine='auto', and please "
                    "report it"
                )
    _SEEN.add((device, variant))
