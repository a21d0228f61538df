"""What happens to a tile of logits between two matrix products, in plain torch or in Triton.

A tile is made from raw products and asked for statistics, for a gradient, or for one after the
other; it may destroy its memory on the way. What statistics are is said in
:mod:`fastdaa.row_passes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fastdaa.head import LmHead
from fastdaa.outputs import TokenStats
from fastdaa.row_passes import (
    FP16_TARGET,
    EntropyTerm,
    RowState,
    entropy_gradient,
    finish_logits,
    logit_gradient,
    logit_slope,
    move_to_front,
    scale_tile,
    set_target,
    steepest_slope,
    take_statistics,
)
from fastdaa.slices import ROW_MULTIPLE
from fastdaa.vocab_shard import VocabShard

if TYPE_CHECKING:
    from fastdaa.kernels.merge_splits import RowStatistics


def logits_memory(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Memory ``[rows, width]`` for logits or their gradients. On GPUs rows begin at multiples of 16
    entries, as the products that read them like it."""
    multiple = 1 if device.type == "cpu" else ROW_MULTIPLE
    stride = -(-width // multiple) * multiple
    return torch.empty((rows, stride), dtype=dtype, device=device)[:, :width]


class RowSlopes(NamedTuple):
    """Statistics ``[r]``, and the derivative ``d logp / d z`` of every row's log-prob by its raw
    products: ``own`` at the target, and ``factors[:, None] * slopes``. It needs no loss."""

    state: RowState
    values: TokenStats | None
    slopes: Tensor
    """``[r, c]``, wide or in the dtype of the next product; 0 at the target."""
    factors: Tensor
    """``[r]``, wide."""
    own: Tensor
    """``[r]``, wide. The largest entry, which need not be rounded as the others are."""


class RowTile(Protocol):
    """Raw products ``z [r, c]`` of hidden states with the weight rows ``columns`` of a head."""

    def __init__(self, head: LmHead, z: Tensor, columns: slice, operand: torch.dtype): ...

    def statistics(
        self, targets: Tensor, stats: bool = False, keep: bool = False
    ) -> tuple[RowState, TokenStats | None]:
        """Statistics of whole rows (all columns), and those only metrics need if ``stats``.

        ``keep`` says that :meth:`gradient` follows.
        """

    def gradient(
        self, state: RowState, targets: Tensor, coefficients: Tensor,
        picked: Tensor | None = None, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Gradient of ``sum(coefficients * logps)`` by the raw products, wide or in ``operand``.

        Of the rows ``picked [a]`` only if given; all other arguments are those of all rows. Into
        ``out`` of dtype ``operand``, which lies elsewhere, if given.
        """

    def slopes(self, targets: Tensor, stats: bool = False, out: Tensor | None = None) -> RowSlopes:
        """Statistics of whole rows and the derivatives of their log-probs by the raw products, or,
        with an ``out [r, <= c]`` as above, by its columns."""

    def entropy_gradient(
        self, state: RowState, term: EntropyTerm, targets: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Gradient of the sum of entropies, times the term's coefficients, by the raw products, as
        :meth:`gradient`; that of ``sum(coefficients * logps)`` as well, if they are given."""

    @staticmethod
    def column_sums(gradient: Tensor) -> Tensor:
        """Sums ``[c]`` of the columns of a gradient, wide."""


class TorchTile:
    """The row passes in plain torch, each elementwise step a pass over memory."""

    def __init__(self, head: LmHead, z: Tensor, columns: slice, operand: torch.dtype):
        self.head, self.columns, self.operand = head, columns, operand
        self.z = finish_logits(head, z, columns)
        self.slope: Tensor | float | None = None
        """Kept by ``statistics``, whose exponentials then stand in ``z``."""

    def statistics(
        self, targets: Tensor, stats: bool = False, keep: bool = False
    ) -> tuple[RowState, TokenStats | None]:
        """See :class:`RowTile`."""
        if keep:
            self.slope = logit_slope(self.head, self.z)
        return take_statistics(self.z, targets, stats, self.head.shard)

    def gradient(
        self, state: RowState, targets: Tensor, coefficients: Tensor,
        picked: Tensor | None = None, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See :class:`RowTile`; wide, in the memory of the tile."""
        z, slope = self.z, self.slope
        if picked is not None:
            z = move_to_front(z, picked)
            slope = move_to_front(slope, picked) if isinstance(slope, Tensor) else slope
            state, targets, coefficients = state.pick(picked), targets[picked], coefficients[picked]
        if slope is None:
            slope = logit_slope(self.head, z)
            p, norm = z.sub_(state.m[:, None]).sub_(state.log_s[:, None]).exp_(), None
        else:
            p, norm = z, torch.exp(-state.log_s)
        first_token = self.head.first_token + self.columns.start
        dz = logit_gradient(p, state.logps, targets, coefficients, first_token, norm)
        dz = scale_tile(dz, slope)
        return dz if out is None else out.copy_(dz[:, : out.shape[1]])

    def slopes(self, targets: Tensor, stats: bool = False, out: Tensor | None = None) -> RowSlopes:
        """See :class:`RowTile`."""
        return _slopes_in_two_passes(self, targets, stats, out)

    def entropy_gradient(
        self, state: RowState, term: EntropyTerm, targets: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See :class:`RowTile`; wide, in the memory of the tile."""
        logps, slope = self.z, self.slope
        if slope is None:
            slope = logit_slope(self.head, logps)
            logps.sub_(state.m[:, None])
        else:  # statistics have left exponentials
            logps.log_()
        dz = entropy_gradient(logps.sub_(state.log_s[:, None]), term, coefficients)
        if targets is not None and coefficients is not None:
            own = term.slope(state.logps) - coefficients * torch.expm1(state.logps)
            set_target(dz, targets, own, self.head.first_token + self.columns.start)
        return scale_tile(dz, slope)

    @staticmethod
    def column_sums(gradient: Tensor) -> Tensor:
        """See :class:`RowTile`."""
        return gradient.sum(dim=0)


class TritonTile:
    """The row passes as one Triton kernel each: one read for statistics, one read and one write
    for a gradient, which takes the place of the logits in the dtype of the next product."""

    def __init__(self, head: LmHead, z: Tensor, columns: slice, operand: torch.dtype):
        if z.dtype != torch.float32:
            raise ValueError(f"engine='triton': expected fp32 logits (fp16, bf16 or fp32 inputs), "
                             f"got {z.dtype}; engine='torch' takes them")  # fmt: skip
        self.head, self.z, self.columns, self.operand = head, z, columns, operand
        bias = None if head.bias is None else head.bias[columns]
        self.first_token = head.first_token + columns.start
        self.options: dict[str, Any] = {
            "bias": bias, "logit_scale": head.logit_scale, "softcap": head.softcap,
            "temperature": head.temperature,
        }  # fmt: skip

    def statistics(
        self, targets: Tensor, stats: bool = False, keep: bool = False
    ) -> tuple[RowState, TokenStats | None]:
        """See :class:`RowTile`; the tile stays as it is."""
        return merged_statistics(self.states(targets, stats), targets, self.head)

    def states(self, targets: Tensor, stats: bool = False) -> Tensor:
        """Statistics ``[splits, fields, r]`` of the tile's vocabulary splits."""
        from fastdaa.kernels.row_statistics import take_row_states

        return take_row_states(
            self.z, targets, stats=stats, first_column=self.first_token, **self.options
        )

    def gradient(
        self, state: RowState, targets: Tensor, coefficients: Tensor,
        picked: Tensor | None = None, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See :class:`RowTile`; in ``operand``, over the logits unless rows are picked."""
        from fastdaa.kernels.row_gradient import write_row_gradient

        if picked is not None and out is None:
            shape = (picked.shape[0], self.z.shape[1])
            out = self.z.new_empty(shape, dtype=self.operand)
        return write_row_gradient(
            self.z, targets, *state, coefficients, dtype=self.operand, out=out, rows=picked,
            first_column=self.first_token, **self.options,
        )  # fmt: skip

    def slopes(self, targets: Tensor, stats: bool = False, out: Tensor | None = None) -> RowSlopes:
        """See :class:`RowTile`; in bf16 one read of the logits, beside them."""
        if self.operand != torch.bfloat16 or self.head.shard is not None:
            return _slopes_in_two_passes(self, targets, stats, out)
        from fastdaa.kernels.row_slopes import take_row_slopes

        if out is None:
            rows, width = self.z.shape
            out = logits_memory(rows, width, self.z.device, self.operand)
        found, factors = take_row_slopes(self.z, targets, out, stats=stats, **self.options)
        state, values = state_and_values(found)
        return RowSlopes(state, values, out, factors, own_slope(self.head, state))

    def entropy_gradient(
        self, state: RowState, term: EntropyTerm, targets: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See :class:`RowTile`; in ``operand``, over the logits."""
        from fastdaa.kernels.row_gradient import write_row_gradient

        if targets is None or coefficients is None:  # no token is a target
            targets = torch.full_like(term.values, -1, dtype=torch.int64)
            coefficients = torch.zeros_like(term.values)
        return write_row_gradient(
            self.z, targets, *state, coefficients, dtype=self.operand, entropy=term.values,
            entropy_coefficients=term.coefficients, first_column=self.first_token, **self.options,
        )  # fmt: skip

    @staticmethod
    def column_sums(gradient: Tensor) -> Tensor:
        """See :class:`RowTile`."""
        from fastdaa.kernels.column_sums import sum_columns

        return sum_columns(gradient)


def _slopes_in_two_passes(
    tile: TorchTile | TritonTile, targets: Tensor, stats: bool, out: Tensor | None
) -> RowSlopes:
    state, values = tile.statistics(targets, stats, keep=True)
    # With the sum of exp(z - m) as coefficients, entries are exp(z - m) itself: half-precision
    # factors keep those of likely tokens near 1, and the sum is divided out of the result.
    coefficients, factors = torch.exp(state.log_s), torch.exp(-state.log_s)
    if tile.operand == torch.float16:
        lift = FP16_TARGET / steepest_slope(tile.head)
        coefficients, factors = coefficients * lift, factors / lift
    nowhere = torch.full_like(targets, -1)  # the target's entry may leave the range of fp16
    slopes = tile.gradient(state, nowhere, coefficients, out=out)
    set_target(slopes, targets, 0.0, tile.head.first_token + tile.columns.start)
    return RowSlopes(state, values, slopes, factors, own_slope(tile.head, state))


def own_slope(
    head: LmHead, state: RowState, coefficients: Tensor | None = None,
    entropy: EntropyTerm | None = None,
) -> Tensor:  # fmt: skip
    """``d logp / d z`` at the target, times coefficients: the slope of its logit times ``1 - p``,
    which would round to 0 for a confident token. That of a term of entropies is added."""
    own = torch.expm1(state.logps).neg_()
    own = own if coefficients is None else coefficients * own
    own = own if entropy is None else own + entropy.slope(state.logps)
    # Without a cap the slope is the same for all logits.
    target_logit = state.logps if head.softcap is None else state.m + state.log_s + state.logps
    return scale_tile(own, logit_slope(head, target_logit))


def merged_statistics(
    states: Tensor, targets: Tensor, head: LmHead
) -> tuple[RowState, TokenStats | None]:
    """Statistics of whole rows from those of all vocabulary splits, as :class:`TritonTile` takes
    them."""
    from fastdaa.kernels.merge_splits import merge_splits

    if head.shard is not None:
        states = _gathered(states, head.shard, head.planned_width)
    return state_and_values(merge_splits(states, targets, head.vocab_size))


def state_and_values(rows: RowStatistics) -> tuple[RowState, TokenStats | None]:
    """What a kernel returns, in two parts; no token statistics where it was not asked."""
    state = RowState(rows.m, rows.log_s, rows.logps)
    values = [value for value in rows[4:] if value is not None]
    return state, TokenStats(*values) if values else None


def _gathered(states: Tensor, shard: VocabShard, widest: int) -> Tensor:
    """States ``[splits, fields, r]`` of the vocabulary splits of all processes, in their order."""
    from fastdaa.kernels.row_statistics import splits_of

    _, fields, rows = states.shape
    splits = splits_of(widest, states.device)
    missing = splits - states.shape[0]
    if missing:  # a narrower slice than the widest: splits without a logit
        nothing = torch.zeros_like(states[:1]).expand(missing, -1, -1).clone()
        nothing[:, 0], nothing[:, 2] = -torch.inf, -torch.inf  # maximum and target
        states = torch.cat([states, nothing])
    everyone = states.new_empty(dist.get_world_size(shard.group) * splits, fields, rows)
    # Into one tensor at once has another name in every second version of torch.
    dist.all_gather(list(everyone.split(splits)), states.contiguous(), group=shard.group)
    return everyone


ENGINES: dict[str, type[RowTile]] = {"torch": TorchTile, "triton": TritonTile}
"""Row passes by the name of ``HeadPlan.engine``."""
