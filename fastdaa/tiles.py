"""Tiles of logits in plain torch: products with fp32 results, statistics, gradients.

``y = z - m`` is a logit less its row's maximum, ``log_s`` the log of the sum of ``exp(y)``. The two
are kept apart: their sum, the log-sum-exp, would swallow ``log_s`` under a large common offset of
the logits, and log-probabilities formed from it would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdaa.head import LmHead
from fastdaa.outputs import TokenStats

_HALVES = (torch.float16, torch.bfloat16)
# exp(-1e4) is 0 in every dtype; a floor keeps 0 * -inf out of the entropy.
_FLOOR = -1.0e4
# Gradient tiles in fp16 are scaled up to about this, far from both underflow and overflow.
FP16_TARGET = 1024.0
# CPU products round differently in the rows that are left over below a multiple of a few rows.
_CPU_ROW_MULTIPLE = 16


def blocks(total: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` (the last one shorter) that cover ``range(total)``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off: operand dtypes are chosen here, and results stay wide."""
    return torch.autocast(device.type, enabled=False)


def operand_dtype(hidden_states: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the factors of every product.

    On CPU half precision is widened to fp32 (there is no product with a wider result). Elsewhere
    equal dtypes stay, mixed ones follow autocast if it is on and are widened if not.
    """
    wide = torch.promote_types(hidden_states.dtype, weight.dtype)
    if hidden_states.device.type == "cpu":
        return torch.promote_types(wide, torch.float32)
    if torch.is_autocast_enabled(hidden_states.device.type) and wide != torch.float64:
        return torch.get_autocast_dtype(hidden_states.device.type)
    return wide


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b``, with an fp32 result for half-precision factors (``out`` is then not used)."""
    if a.dtype in _HALVES:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def logits_product(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``hidden @ weight.T``, wide, the same bits for a row whichever rows come with it.

    Policy and reference may meet a row in blocks of different heights; on CPU, blocks are filled up
    with zero rows to a multiple that no product rounds differently.
    """
    missing = _missing_rows(hidden.shape[0]) if hidden.device.type == "cpu" else 0
    if not missing:
        return product(hidden, weight.T, out)
    z = product(F.pad(hidden, (0, 0, 0, missing)), weight.T)[: hidden.shape[0]]
    return z if out is None else out.copy_(z)


def _missing_rows(rows: int) -> int:
    fewest = max(_CPU_ROW_MULTIPLE, 8 * torch.get_num_threads())
    return max(fewest - rows, -rows % _CPU_ROW_MULTIPLE)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the dtype of ``total``."""
    if a.dtype in _HALVES:
        total.add_(product(a, b))
    else:
        total.addmm_(a, b)


class Logits:
    """Tiles of the logits of ``hidden_states [N, D]`` under a head, in fp32 (or fp64)."""

    def __init__(self, hidden_states: Tensor, head: LmHead, operand: torch.dtype | None = None):
        self.head = head
        # A backward pass runs outside the autocast of its forward, so it hands over the dtype.
        self.operand = operand or operand_dtype(hidden_states, head.weight)
        self.wide = torch.float64 if self.operand == torch.float64 else torch.float32
        self.hidden_states = hidden_states

    def rows(self, rows: slice | Tensor) -> Tensor:
        """Hidden states ``[r, D]`` as a factor."""
        return self.hidden_states[rows].to(self.operand)

    def columns(self, columns: slice) -> Tensor:
        """Weight rows ``[c, D]`` as a factor."""
        return self.head.weight[columns].to(self.operand)

    def tile(
        self, hidden: Tensor, weight: Tensor, columns: slice, out: Tensor | None = None
    ) -> Tensor:
        """Final logits ``[r, c]``: bias, scale, cap and temperature applied.

        ``out`` may be a wide buffer to use; it is not used for half-precision factors.
        """
        head = self.head
        z = logits_product(hidden, weight, out)
        if head.bias is not None:
            z += head.bias[columns].to(self.wide)
        if head.logit_scale != 1.0:
            z *= head.logit_scale
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        if head.temperature != 1.0:
            z /= head.temperature
        return z

    @property
    def steepest(self) -> float:
        """The largest size of ``slope``."""
        return abs(self.head.logit_scale / self.head.temperature)

    def slope(self, z: Tensor) -> Tensor | float:
        """Derivative of the final logits by the raw product, from the final logits ``z``."""
        head = self.head
        factor = head.logit_scale / head.temperature
        if head.softcap is None:
            return factor
        capped = z * (head.temperature / head.softcap)
        return capped.square_().neg_().add_(1.0).mul_(factor)


class RowState(NamedTuple):
    """Statistics of rows of logits; all ``[r]`` and wide."""

    m: Tensor
    """Maximum, or 0 in a row of ``-inf``."""
    log_s: Tensor
    """Log of the sum of ``exp(z - m)``."""
    logps: Tensor
    """Log-probability of the target."""


def take_statistics(
    z: Tensor, targets: Tensor, stats: bool = False
) -> tuple[RowState, TokenStats | None]:
    """Statistics of whole rows of logits ``z [r, V]``, which become ``exp(z - m)``."""
    target = z.gather(1, targets[:, None])[:, 0]
    highest = z.amax(dim=1)
    # A row of -inf has no maximum to subtract; 0 keeps exp(-inf - m) at 0.
    m = torch.where(highest == -torch.inf, 0.0, highest)
    mean_logit = z.mean(dim=1) if stats else None
    y = z.sub_(m[:, None])
    if not stats:
        return _state(y.exp_(), targets, target, m), None
    weighted = y.clamp(min=_FLOOR)
    state = _state(y.exp_(), targets, target, m)
    entropy = state.log_s - weighted.mul_(y).sum(dim=1) * torch.exp(-state.log_s)
    top1 = (target >= highest).to(z.dtype)
    return state, TokenStats(entropy, top1, mean_logit)  # type: ignore[arg-type]


def _state(e: Tensor, targets: Tensor, target: Tensor, m: Tensor) -> RowState:
    """From ``e = exp(z - m)`` and the targets' logits.

    The target is left out of the sum: where it is the maximum its 1 would swallow the rest, and a
    confident token would have a log-prob and a gradient of 0.
    """
    own = torch.exp(target - m)
    set_target(e, targets, 0.0)
    rest = _row_sums(e)
    set_target(e, targets, own)
    log_s = torch.where(own == 1.0, rest.log1p(), (rest + own).log())
    return RowState(m, log_s, (target - m) - log_s)


def _row_sums(tile: Tensor) -> Tensor:
    """Sums ``[r]`` of the rows of a tile, the same bits whichever rows come with it."""
    if tile.shape[0] == 1 and tile.device.type == "cpu":
        # torch splits the sum of a single row over its threads, and so rounds it differently.
        return tile.expand(2, -1).sum(dim=1)[:1]
    return tile.sum(dim=1)


def _local(targets: Tensor, first_column: int, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a tile, and where in it (clamped for the others)."""
    local = targets - first_column
    return (local >= 0) & (local < width), local.clamp(0, width - 1)


def set_target(
    tile: Tensor, targets: Tensor, values: Tensor | float, first_column: int = 0
) -> None:
    """``tile[i, targets[i]] = values[i]`` for the targets inside the tile."""
    inside, local = _local(targets, first_column, tile.shape[1])
    column = local[:, None]
    kept = tile.gather(1, column)[:, 0]
    tile.scatter_(1, column, torch.where(inside, values, kept)[:, None])


def logit_gradient(
    p: Tensor,
    logps: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    first_column: int,
    norm: Tensor | None = None,
) -> Tensor:
    """In place: probabilities ``p * norm``, ``[r, c]``, to ``coefficients * (onehot - p * norm)``.

    The target's entry is ``-expm1(logp)``: ``1 - p`` would round to 0 for a confident token.
    """
    p.mul_(-(coefficients if norm is None else coefficients * norm)[:, None])
    set_target(p, targets, coefficients * -torch.expm1(logps), first_column)
    return p


def scale_tile(tile: Tensor, slope: Tensor | float) -> Tensor:
    """``tile * slope`` in place, skipping the pass over memory where the slope is 1."""
    if isinstance(slope, Tensor) or slope != 1.0:
        tile *= slope
    return tile


class GradientFactor:
    """Casts gradient tiles to the dtype of the products, and knows how to undo the scaling.

    fp16 has too few exponents for a coefficient times a small probability: tiles are scaled by a
    power of two taken from the largest coefficient and the steepest slope of a logit, results are
    scaled back.
    """

    def __init__(self, logits: Logits, coefficients: Tensor):
        self.operand = logits.operand
        self.scale: Tensor | None = None
        if self.operand == torch.float16 and coefficients.numel():
            largest = coefficients.abs().amax() * logits.steepest
            largest = largest.clamp(min=torch.finfo(torch.float32).tiny)
            self.scale = torch.exp2(torch.floor(torch.log2(FP16_TARGET / largest)))

    def cast(self, tile: Tensor) -> Tensor:
        """A gradient tile as a factor."""
        if self.scale is not None:
            tile = tile * self.scale
        return tile.to(self.operand)

    def restore(self, result: Tensor) -> Tensor:
        """A product with a cast tile, in its true size (in place)."""
        return result if self.scale is None else result.div_(self.scale)

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """``total += a @ b`` where one factor is a cast tile."""
        if self.scale is None:
            accumulate(total, a, b)
        else:
            total.add_(self.restore(product(a, b)))
