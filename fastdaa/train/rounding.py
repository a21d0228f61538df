"""Weights of 16 bits that are too coarse for the steps of the optimizer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)
_HALF = (torch.bfloat16, torch.float16)
_SAMPLED = 1024
_MOST = 0.5


@torch.no_grad()
def share_lost(model: nn.Module, step: float) -> float:
    """The share of trained weights of 16 bits that stay the same when ``step`` is added.

    A sample, spread over every weight; 0 where there are no such weights. A weight ``w`` of bf16
    has neighbours ``2^-8 |w|`` to ``2^-7 |w|`` away, and a step below half of that is rounded away.
    """
    lost, seen = 0.0, 0
    for weight in model.parameters():
        if not weight.requires_grad or weight.dtype not in _HALF or weight.is_meta:
            continue
        values = _sample(weight.to_local() if isinstance(weight, DTensor) else weight)
        stays = (values.float() + step).to(values.dtype) == values
        lost += float(stays.float().mean()) * weight.numel() if len(values) else 0.0
        seen += weight.numel()
    return lost / seen if seen else 0.0


def warn_of_rounding(trainer: Any) -> None:
    """Say where most weights would not change: one step of AdamW is about the learning rate."""
    args = trainer.args
    kept_wide = trainer.is_deepspeed_enabled or (
        trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no"
    )
    adam = "adam" in str(getattr(args.optim, "value", args.optim))
    if kept_wide or not adam or not args.learning_rate > 0:
        return
    share = share_lost(trainer.model, args.learning_rate)
    if share > _MOST:
        dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad} & {*_HALF}
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        logger.warning(
            "weights in %s: a step of AdamW is about learning_rate %g, which rounds to nothing in "
            "%.0f%% of them; train weights in float32 (--dtype float32), with --bf16 for the speed",
            names, args.learning_rate, 100 * share,
        )  # fmt: skip


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    count = min(flat.numel(), _SAMPLED)
    if not count:
        return flat
    places = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
    return flat[places.to(flat.device)]
