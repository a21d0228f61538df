"""Passes over rows of logits in plain torch, each elementwise step a pass over memory.

``y = z - m`` is a logit less its row's maximum, ``log_s`` the log of the sum of ``exp(y)``. The two
are kept apart: their sum, the log-sum-exp, would swallow ``log_s`` under a large common offset of
the logits, and log-probabilities formed from it would be wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastdaa.head import LmHead
from fastdaa.outputs import TokenStats
from fastdaa.slices import PRODUCT_BYTES
from fastdaa.vocab_shard import VocabShard

# exp(-1e4) is 0 in every dtype; a floor keeps 0 * -inf out of the entropy.
_FLOOR = -1.0e4
# Gradient tiles in fp16 are scaled up to about this, far from both underflow and overflow.
FP16_TARGET = 1024.0
# Columns that a reduction on CUDA leaves to one block.
_CUDA_ROW = 65536


class RowState(NamedTuple):
    """Statistics of rows of logits; all ``[r]`` and wide."""

    m: Tensor
    """Maximum, or 0 in a row of ``-inf``."""
    log_s: Tensor
    """Log of the sum of ``exp(z - m)``."""
    logps: Tensor
    """Log-probability of the target."""

    def pick(self, rows: slice | Tensor) -> RowState:
        """The state of some rows."""
        return RowState(self.m[rows], self.log_s[rows], self.logps[rows])


def finish_logits(head: LmHead, z: Tensor, columns: slice) -> Tensor:
    """Raw products ``[r, c]`` to final logits, in place: bias, scale, cap and temperature."""
    if head.bias is not None:
        z += head.bias[columns].to(z.dtype)
    if head.logit_scale != 1.0:
        z *= head.logit_scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.temperature != 1.0:
        z /= head.temperature
    return z


def steepest_slope(head: LmHead) -> float:
    """The largest size of the derivative of a final logit by its raw product."""
    return abs(head.logit_scale / head.temperature)


def logit_slope(head: LmHead, z: Tensor) -> Tensor | float:
    """Derivative of the final logits by the raw products, from the final logits ``z``."""
    factor = head.logit_scale / head.temperature
    if head.softcap is None:
        return factor
    capped = z * (head.temperature / head.softcap)
    return capped.square_().neg_().add_(1.0).mul_(factor)


def take_statistics(
    z: Tensor, targets: Tensor, stats: bool = False, shard: VocabShard | None = None
) -> tuple[RowState, TokenStats | None]:
    """Statistics of whole rows of logits ``z [r, V]``, which become ``exp(z - m)``.

    Where the rows are split over processes: one all-reduce of maxima and one of sums.
    """
    first_token = 0 if shard is None else shard.start
    target, highest = _target_and_maximum(z, targets, shard)
    # A row of -inf has no maximum to subtract; 0 keeps exp(-inf - m) at 0.
    m = torch.where(highest == -torch.inf, 0.0, highest)
    total = z.sum(dim=1) if stats else None
    y = z.sub_(m[:, None])
    weighted = y.clamp(min=_FLOOR) if stats else None
    e, own = y.exp_(), torch.exp(target - m)
    # The target is left out of the sum: where it is the maximum its 1 would swallow the rest, and
    # a confident token would have a log-prob and a gradient of 0.
    set_target(e, targets, 0.0, first_token)
    rest = _row_sums(e)
    set_target(e, targets, own, first_token)
    if weighted is None or total is None:
        (rest,) = _summed([rest], shard)
        return _state(rest, own, target, m), None
    weighted_sum = weighted.mul_(e).sum(dim=1)
    squares = torch.mul(e, e, out=weighted).sum(dim=1)
    rest, weighted_sum, squares, total = _summed([rest, weighted_sum, squares, total], shard)
    state = _state(rest, own, target, m)
    entropy = state.log_s - weighted_sum * torch.exp(-state.log_s)
    top1 = (target >= highest).to(z.dtype)
    vocab_size = z.shape[1] if shard is None else shard.vocab_size
    log_sum_sq = squares.log() - 2 * state.log_s
    return state, TokenStats(entropy, top1, total / vocab_size, log_sum_sq)


def _target_and_maximum(
    z: Tensor, targets: Tensor, shard: VocabShard | None
) -> tuple[Tensor, Tensor]:
    """Logit of the target and largest logit of every row, both ``[r]``."""
    highest = z.amax(dim=1)
    if shard is None:
        return z.gather(1, targets[:, None])[:, 0], highest
    inside, local = in_tile(targets, shard.start, z.shape[1])
    target = torch.where(inside, z.gather(1, local[:, None])[:, 0], -torch.inf)
    both = torch.stack([target, highest])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=shard.group)
    return both[0], both[1]


def _summed(parts: list[Tensor], shard: VocabShard | None) -> list[Tensor]:
    """Sums over the processes that share the rows, in one all-reduce."""
    if shard is None:
        return parts
    packed = torch.stack(parts)
    dist.all_reduce(packed, group=shard.group)
    return list(packed)


def _state(rest: Tensor, own: Tensor, target: Tensor, m: Tensor) -> RowState:
    """From the sum of ``exp(z - m)`` without the target, and the target's part ``own`` of it."""
    log_s = torch.where(own == 1.0, rest.log1p(), (rest + own).log())
    return RowState(m, log_s, (target - m) - log_s)


def _row_sums(tile: Tensor) -> Tensor:
    """Sums ``[r]`` of the rows of a tile, the same bits whichever rows come with it."""
    if tile.shape[0] == 1 and tile.device.type == "cpu":
        # torch splits the sum of a single row over its threads, and so rounds it differently.
        return tile.expand(2, -1).sum(dim=1)[:1]
    if tile.device.type == "cuda":
        return _row_sums_on_cuda(tile)
    return tile.sum(dim=1)


def _row_sums_on_cuda(tile: Tensor) -> Tensor:
    """Torch's reduction has another shape below 16 rows, and shares a row of 131072 entries or more
    among as many blocks as the number of rows leaves free."""
    rows = tile.shape[0]
    enough = tile if rows >= 16 else tile.expand(16, *tile.shape)
    first, *others = (part.sum(dim=-1) for part in enough.split(_CUDA_ROW, dim=-1))
    sums = sum(others, start=first)
    return sums if rows >= 16 else sums[0]


def in_tile(targets: Tensor, first_column: int, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a tile, and where in it (clamped for the others)."""
    local = targets - first_column
    return (local >= 0) & (local < width), local.clamp(0, width - 1)


def set_target(
    tile: Tensor, targets: Tensor, values: Tensor | float, first_column: int = 0
) -> None:
    """``tile[i, targets[i]] = values[i]`` for the targets inside the tile."""
    inside, local = in_tile(targets, first_column, tile.shape[1])
    kept = tile.gather(1, local[:, None])[:, 0]
    # On CPU a scatter would copy a tile of half precision.
    at = torch.arange(tile.shape[0], device=tile.device), local
    tile.index_put_(at, torch.where(inside, values, kept))


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


class EntropyTerm(NamedTuple):
    """What a loss has of the entropies of rows, beside their log-probs; both ``[r]`` and wide."""

    values: Tensor
    coefficients: Tensor

    def pick(self, rows: slice | Tensor) -> EntropyTerm:
        """That of some rows."""
        return EntropyTerm(self.values[rows], self.coefficients[rows])

    def slope(self, logps: Tensor) -> Tensor:
        """Its derivative by the logits of tokens ``[r]`` with such log-probs."""
        return -self.coefficients * logps.exp() * (logps.clamp(min=_FLOOR) + self.values)


def entropy_gradient(
    logps: Tensor, term: EntropyTerm, coefficients: Tensor | None = None
) -> Tensor:
    """In place: log-probabilities ``[r, c]`` to ``-p * (h * (log p + entropy) + coefficients)`` for
    the term's coefficients ``h``; the last ones are those of the log-probs, beside their targets.
    """
    p = logps.exp()
    logps.clamp_(min=_FLOOR).add_(term.values[:, None])
    if coefficients is None:
        return logps.mul_(p).mul_(-term.coefficients[:, None])
    return logps.mul_(term.coefficients[:, None]).add_(coefficients[:, None]).mul_(p).neg_()


def move_to_front(tile: Tensor, rows: Tensor) -> Tensor:
    """``tile[rows]`` of ascending rows, in the memory of the tile, a cacheful at a time."""
    size = max(PRODUCT_BYTES // max(tile.element_size() * tile.shape[1], 1), 1)
    # Rows only move towards the front: none lands on one that is still to be moved.
    for start in range(0, rows.shape[0], size):
        part = rows[start : start + size]
        tile[start : start + part.shape[0]] = tile[part]
    return tile[: rows.shape[0]]


def scale_tile(tile: Tensor, slope: Tensor | float) -> Tensor:
    """``tile * slope`` in place, skipping the pass over memory where the slope is 1."""
    if isinstance(slope, Tensor) or slope != 1.0:
        tile *= slope
    return tile
