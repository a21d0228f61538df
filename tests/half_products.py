"""Products of half-precision factors with fp32 results, which exist on GPUs only, on a CPU."""

from __future__ import annotations

import pytest
import torch

from fastdaa import (
    compiled_divergence,
    compiled_entropy,
    compiled_kept,
    compiled_logps,
    compiled_logps_and_entropy,
    compiled_loss,
    divergence_tiles,
    entropy,
    entropy_tiles,
    frozen,
    gradient_sums,
    kept_products,
    plan_call,
    recompute,
    tiles,
)

_NUMERIC = (tiles, frozen, kept_products, gradient_sums, divergence_tiles, entropy_tiles)
_COMPILED = (
    compiled_divergence, compiled_entropy, compiled_kept, compiled_logps,
    compiled_logps_and_entropy, compiled_loss,
)  # fmt: skip


def take_half_factors(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> set[torch.dtype]:
    """Products as on a GPU; returns the dtypes of factors that they see.

    The products of fastdaa are replaced by an exact model, so that what surrounds them runs as it
    does there.
    """
    seen: set[torch.dtype] = set()

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        seen.update((a.dtype, b.dtype))
        result = a.float() @ b.float()
        return result if out is None else out.copy_(result)

    def add_half_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        total.add_(product(a, b))

    monkeypatch.setattr(tiles, "add_half_product", add_half_product)
    for module in _NUMERIC:
        monkeypatch.setattr(module, "product", product)
    for module in (tiles, recompute, plan_call, entropy, *_COMPILED):
        monkeypatch.setattr(module, "operand_dtype", lambda *_: dtype)
    return seen
