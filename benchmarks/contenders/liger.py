"""liger-kernel: the fused linear DPO loss (plain torch) and the fused cross-entropy (Triton)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.contenders.base import (
    Contender,
    Outputs,
    TokenScorer,
    installed,
    needs_cuda,
    with_gradients,
)
from fastdaa.benchmarks.inputs import HeadInputs
from fastdaa.benchmarks.pair_objectives import BETA

_HINT = "pip install 'fastdaa[bench]'"
_LOSS_TYPES = {"dpo": "sigmoid", "slic": "hinge"}


class FusedLinearDPO(Contender):
    """``LigerFusedLinearDPOLoss``, one pair a chunk (its default), compiled on CUDA alone.

    It takes padded rows ``[2B, T]`` and projects the reference's hidden states itself, so it takes
    part where the reference is online. Here there are no prompts in its rows, and no padding where
    completions are of equal length: in training it projects both.
    """

    name, family = "liger-dpo", "liger"

    def version(self) -> str:
        """liger-kernel's."""
        return installed("liger-kernel", _HINT)

    def applies(self, case: Case) -> bool:
        """Losses."""
        return case.is_loss

    def supports(self, case: Case) -> str | None:
        """sigmoid and hinge, reference online, no softcap."""
        if case.work not in _LOSS_TYPES:
            return f"LigerFusedLinearDPOLoss has no {case.work}"
        if case.reference != "online":
            return "LigerFusedLinearDPOLoss takes no reference log-probs"
        return "LigerFusedLinearDPOLoss has no softcap" if case.softcap is not None else None

    def gemms(self, case: Case) -> int:
        """Gradients in forward: no product twice."""
        return 3 + case.wants_head_grad

    def prepare(self, inputs: HeadInputs) -> Callable[[], Outputs]:
        """See :class:`Contender`. Padding the rows is not part of the time."""
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss_fn = LigerFusedLinearDPOLoss(
            beta=BETA, loss_type=_LOSS_TYPES[inputs.case.work],
            compiled=inputs.device.type == "cuda",
        )  # fmt: skip
        assert inputs.ref_hidden is not None
        where = padded_positions(inputs)
        labels = inputs.targets.new_full(where.shape, -100)
        labels[where >= 0] = inputs.targets[where[where >= 0]]
        ref_hidden = pad_rows(inputs.ref_hidden, where)
        hidden = pad_rows(inputs.hidden.detach(), where).requires_grad_()
        places = token_places(where, inputs.case.tokens)
        leaves = (hidden, inputs.weight) if inputs.case.head_grad else (hidden,)

        def run() -> Outputs:
            loss, _ = loss_fn(
                inputs.weight, hidden, labels, ref_input=ref_hidden,
                ref_weight=inputs.weight.detach(),
            )  # fmt: skip
            dh, *dw = torch.autograd.grad(loss, leaves)
            return with_gradients(loss, None, (dh.flatten(0, 1)[places], *dw))

        return run


def padded_positions(inputs: HeadInputs) -> Tensor:
    """Which token stands at each position of ``[2B, T]`` rows, all chosen first; -1 is padding."""
    order = torch.arange(len(inputs.counts)).view(-1, 2).T.reshape(-1).tolist()
    where = torch.full((len(order), max(inputs.counts)), -1)
    starts = [sum(inputs.counts[:s]) for s in range(len(order))]
    for row, s in enumerate(order):
        where[row, : inputs.counts[s]] = torch.arange(inputs.counts[s]) + starts[s]
    return where.to(inputs.device)


def pad_rows(rows: Tensor, where: Tensor) -> Tensor:
    """``[N, D]`` to ``[2B, T, D]``, zeros where there is padding."""
    padded = rows[where.clamp(min=0)]
    padded[where < 0] = 0
    return padded


def token_places(where: Tensor, tokens: int) -> Tensor:
    """Where each of ``N`` tokens stands in the flattened ``[2B T]`` rows, ``[N]`` int64."""
    flat = where.flatten()
    (inside,) = torch.where(flat >= 0)
    places = torch.empty(tokens, dtype=torch.int64, device=where.device)
    places[flat[inside]] = inside
    return places


class FusedLinearCrossEntropy(TokenScorer):
    """``LigerFusedLinearCrossEntropyFunction``, the Triton kernel with its defaults."""

    name, family = "liger-flce", "liger"

    def version(self) -> str:
        """liger-kernel's."""
        return installed("liger-kernel", _HINT)

    def check_device(self, device: str) -> None:
        """CUDA."""
        needs_cuda("liger's fused cross-entropy", device)

    def gemms(self, case: Case) -> int:
        """Once for the mean, logits twice for log-probs."""
        again = case.wants_grad and case.work != "ce"
        return 1 + case.wants_grad + case.wants_head_grad + again + (case.reference == "online")

    def score_tokens(self, hidden: Tensor, weight: Tensor, inputs: HeadInputs) -> Tensor:
        """See :class:`TokenScorer`."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        reduction = "mean" if inputs.case.work == "ce" else "none"
        loss_fn = LigerFusedLinearCrossEntropyLoss(reduction=reduction, softcap=inputs.case.softcap)
        return -loss_fn(weight, hidden, inputs.targets)
