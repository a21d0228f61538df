"""Is a training step right? Its first losses and gradient norms against the fp64 oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastdaa.benchmarks.step.oracle import Expected
from fastdaa.benchmarks.step.plan import Plan


class Limits(NamedTuple):
    """Allowed difference of a loss from the oracle's, absolute (relative above 1), and of a
    gradient norm, relative."""

    loss: float
    grad_norm: float


FP32 = Limits(1e-4, 1e-3)
# bf16 autocast: a log-prob of a few hundred tokens is off by some tenths of a nat, the margin by
# beta times that, the loss by half of it (peers round whole logits to bf16).
BF16 = Limits(5e-2, 1e-1)


def limits(plan: Plan) -> Limits:
    """Of the plan's precision."""
    return BF16 if plan.mixed else FP32


def compare(
    losses: Sequence[float], grad_norms: Sequence[float | None], expected: Expected, allowed: Limits
) -> tuple[str | None, dict[str, Any]]:
    """Why the row is WRONG, or None; and the errors for the row.

    A loss or norm that is not finite is wrong; so is a run that reports fewer steps than the
    oracle has. Gradient norms that a trainer does not report are not compared.
    """
    steps = len(expected.losses)
    if len(losses) < steps:
        return f"expected {steps} losses, got {len(losses)}", {"limit": allowed._asdict()}
    loss_errors = [
        abs(got - want) / max(1.0, abs(want))
        for got, want in zip(losses, expected.losses, strict=False)
    ]
    norm_errors = [
        abs(got - want) / max(abs(want), 1e-12)
        for got, want in zip(grad_norms, expected.grad_norms, strict=False)
        if got is not None
    ]
    error: dict[str, Any] = {"loss": _largest(loss_errors)}
    if norm_errors:
        error["grad_norm"] = _largest(norm_errors)
    error["limit"] = allowed._asdict()
    for name, errors, limit, got, want in (
        ("loss", loss_errors, allowed.loss, losses, expected.losses),
        ("grad_norm", norm_errors, allowed.grad_norm, grad_norms, expected.grad_norms),
    ):
        for step, size in enumerate(errors):
            if not size <= limit:
                return (
                    f"{name} of step {step + 1}: expected {want[step]:.6g} within {limit:g}, "
                    f"got {got[step]:.6g}"
                ), error
    return None, error


def _largest(errors: Sequence[float]) -> float:
    """The largest, or NaN if any is not a number."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)
