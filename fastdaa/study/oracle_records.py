"""The bandits that the oracles solve, and the records in which they report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ACTIONS = 5


def bandit(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Reference log-probs and rewards ``[ACTIONS]`` fp64, the rewards' mean under it at 0."""
    generator = torch.Generator().manual_seed(seed)
    logits, rewards = torch.randn(2, ACTIONS, generator=generator, dtype=torch.float64)
    ref_logps = torch.log_softmax(logits, 0)
    return ref_logps, rewards - ref_logps.exp() @ rewards


def record(name: str, claim: str, expected: float, got: float, tolerance: float) -> dict[str, Any]:
    """A number against its closed form."""
    error = abs(expected - got)
    return {
        "name": name, "claim": claim, "expected": expected, "got": got, "error": error,
        "tolerance": tolerance, "holds": error <= tolerance,
    }  # fmt: skip


def vector_record(
    name: str, claim: str, expected: Tensor, got: Tensor, tolerance: float
) -> dict[str, Any]:
    """A vector against its closed form: the largest difference of any entry decides."""
    error = float((expected - got).abs().max())
    entry = record(name, claim, float(expected.max()), float(got.max()), tolerance)
    return entry | {"error": error, "holds": error <= tolerance}


def apart_record(
    name: str, claim: str, expected: Tensor, got: Tensor, least: float
) -> dict[str, Any]:
    """Two vectors that must differ by more than ``least`` in some entry."""
    entry = vector_record(name, claim, expected, got, least)
    return entry | {"tolerance": None, "holds": entry["error"] > least}
