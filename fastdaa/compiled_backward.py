"""The backward pass of :mod:`fastdaa.compiled_loss`: gradients from what the forward pass kept.

An operator of its own, so that each gradient is made in the dtype of its tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.compiled_logps import HeadSettings
from fastdaa.compiled_operators import present, present_fake, wide_dtype
from fastdaa.compiled_sizes import HOST_READS
from fastdaa.frozen import scaled_slopes
from fastdaa.kept import Waiting, waiting_gradients
from fastdaa.kept_products import KeptGradients
from fastdaa.losses import Objective
from fastdaa.plan_call import plan_call
from fastdaa.recompute import head_gradients
from fastdaa.row_passes import RowState
from fastdaa.tiles import Logits


class Saved(NamedTuple):
    """What forward keeps for backward; without rows where the plan keeps something else."""

    coefficients: Tensor
    """``[N]`` derivatives of the loss by the log-probs."""
    factors: Tensor
    """``[N]`` that goes with ``dz``, as the next."""
    own: Tensor
    """``[N]`` entries of the gradient at the targets."""
    active: Tensor
    """``[a]`` rows of ``dz``, if they are not all."""
    dz: Tensor
    """``[a, c]`` gradients of the logits without coefficients, see :mod:`fastdaa.kept`."""
    m: Tensor
    """``[N]``, to compute the logits again, of the columns that ``dz`` does not have if it has
    any."""
    log_s: Tensor
    """``[N]`` that goes with ``m``."""
    hidden: Tensor
    """``[N, D]`` gradient of the hidden states, wide; of a frozen head without ``coefficients``,
    which are there, too."""
    weight: Tensor
    """``[V, D]`` gradient of the weight, wide."""
    bias: Tensor
    """``[V]`` gradient of the bias, wide."""

    @staticmethod
    def nothing(rows: Tensor, weight: Tensor, operand: torch.dtype) -> Saved:
        """All of them without rows."""

        def empty(*columns: int, dtype: torch.dtype | None = None) -> Tensor:
            return rows.new_empty((0, *columns), dtype=dtype or wide_dtype(operand))

        return Saved(
            empty(), empty(), empty(), empty(dtype=torch.int64),
            empty(weight.shape[0], dtype=operand), empty(), empty(), empty(rows.shape[1]),
            empty(weight.shape[1]), empty(),
        )  # fmt: skip


@torch.library.custom_op("fastdaa::pair_loss_gradients", mutates_args=(), tags=HOST_READS)
def pair_loss_gradients(
    grad_loss: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logps: Tensor,
    coefficients: Tensor,
    factors: Tensor,
    own: Tensor,
    active: Tensor,
    dz: Tensor,
    m: Tensor,
    log_s: Tensor,
    hidden_sum: Tensor,
    weight_sum: Tensor,
    bias_sum: Tensor,
    objective: str,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    shard: list[int] | None,
    group: str | None,
    operand: torch.dtype,
    impl: str,
    engine: str,
    max_bytes: int | None,
    stats: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias from :class:`Saved`; empty where not wanted."""
    tensors, sums = (rows, weight, bias), (hidden_sum, weight_sum, bias_sum)
    wants = wanted[0], wanted[1], wanted[2]
    if hidden_sum.numel() and coefficients.numel():
        by_hidden = scaled_slopes(hidden_sum, coefficients * grad_loss, rows.dtype)
        return present((by_hidden, None, None), rows)
    if any(total.numel() for total in sums):
        grads = tuple(
            torch.mul(total, grad_loss, out=torch.empty_like(t)) if want and t is not None else None
            for total, t, want in zip(sums, tensors, wants, strict=True)
        )
        return present((grads[0], grads[1], grads[2]), rows)
    head = HeadSettings(softcap, logit_scale, temperature, shard, group).head(weight, bias)
    formula = Objective.by_key(objective)
    plan = plan_call(
        rows, head, wanted=(wanted[0], wanted[1] or wanted[2]), loss_inside=True,
        coupled=formula.coupled, sparse=formula.sparse, selected=True, stats=stats, operand=operand,
        impl=impl, engine=engine, max_bytes=max_bytes,
    )  # fmt: skip
    logits, scaled = Logits(rows, head, operand, plan.engine), coefficients * grad_loss
    if not factors.shape[0]:
        state = RowState(m, log_s, logps)
        return present(head_gradients(logits, targets, scaled, state, plan, wants), rows)
    some = active if dz.shape[0] < rows.shape[0] else None
    kept = KeptGradients(dz[:, : weight.shape[0]], factors, own, some)
    waiting = Waiting(scaled, RowState(m, log_s, logps), kept)
    return present(waiting_gradients(logits, targets, waiting, plan, wants), rows)


@pair_loss_gradients.register_fake
def _(
    grad_loss: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return present_fake((rows, weight, bias), rest[-1])
