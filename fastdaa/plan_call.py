"""The plan of a call, from its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.first_order import check_no_tangents
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.planner import plan_head
from fastdaa.tiles import operand_dtype


def plan_call(
    rows: Tensor,
    head: LmHead,
    *,
    wanted: tuple[bool, bool] | None = None,
    loss_inside: bool = False,
    coupled: bool = False,
    sparse: bool = False,
    stats: bool = False,
    selected: bool = False,
    divergence: bool = False,
    entropy: bool = False,
    bonus: bool = False,
    tokens: int | None = None,
    counts: tuple[int, ...] = (),
    operand: torch.dtype | None = None,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
) -> HeadPlan:
    """:func:`fastdaa.plan_head` for scored rows ``[N, D]`` of hidden states under a head.

    Args:
        wanted: whether gradients of the hidden states and of the head are; None for what autograd
            says.
        sparse: the loss gives many tokens a coefficient of exactly 0.
        selected: the rows are a copy, made from hidden states of more positions.
        divergence: tiles are compared with those of a reference under a head of the same size.
        entropy: the gradient is that of entropies.
        bonus: it is that of log-probs and entropies.
        tokens: how many rows will be selected of ``rows``, chunk by chunk where there are chunks;
            None where they are all scored.
        counts: of these, those of every sequence, pair-major; empty if not known.
        operand: dtype of the factors of the products, where autocast was seen elsewhere.

    Raises:
        RuntimeError: kernels would lose the derivatives of forward-mode differentiation.
    """
    grad = torch.is_grad_enabled()
    hidden_grad, head_grad = wanted or (grad and rows.requires_grad, grad and head.trained)
    plan = plan_head(
        head.planned_width, rows.device, hidden_grad=hidden_grad, head_grad=head_grad,
        loss_inside=loss_inside, coupled=coupled, impl=impl, engine=engine, max_bytes=max_bytes,
        tokens=rows.shape[0] if tokens is None else tokens, hidden_size=rows.shape[1],
        operand=operand or operand_dtype(rows, head.weight), weight_dtype=head.weight.dtype,
        hidden_dtype=rows.dtype, softcap=head.softcap is not None, stats=stats,
        sparse=sparse, selected=selected or tokens is not None, divergence=divergence,
        sharded=head.shard is not None, entropy=entropy, bonus=bonus, gathered=tokens is not None,
        counts=counts,
    )  # fmt: skip
    if plan.engine != "torch":
        check_no_tangents(plan.engine, rows, head.weight, head.bias)
    return plan
