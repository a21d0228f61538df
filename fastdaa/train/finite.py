"""A run whose numbers are no longer finite is stopped, before it writes over what was good.

A gradient that is not finite makes all weights so in one step. Looked at are numbers that are on
the host anyway, in every logged row, and the weights before they are saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastdaa.train.checkpoints import last_complete
from fastdaa.train.zero3 import own_piece

_ADVICE = (
    "A lower learning_rate, more warmup_steps or a smaller max_grad_norm may help; look at the "
    "rows of the last steps in metrics.jsonl"
)


def check_row(trainer: Any, logs: Mapping[str, Any]) -> None:
    """Look at the loss and the gradient norm of a logged row.

    With ``logging_nan_inf_filter``, what is logged in place of a loss that is not finite is finite
    (the Trainer has seen to it), and the gradient norm decides. Under fp16 that may be infinite:
    such steps are skipped, with a smaller scale afterwards.

    Raises:
        FloatingPointError: one of them is not finite.
    """
    scaled = trainer.accelerator.mixed_precision == "fp16"
    names = ["loss"] if scaled else ["loss", "grad_norm"]
    broken = [name for name in names if not math.isfinite(logs.get(name, 0.0))]
    if broken:
        said = " and ".join(f"{name} {logs[name]}" for name in broken)
        raise FloatingPointError(_message(trainer, f"finite numbers, got {said}"))


def check_weights(trainer: Any) -> None:
    """Look at the weights that are trained, before they are saved.

    Raises:
        FloatingPointError: one of them is not finite.
    """
    broken = not all_finite(trainer.model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # Of shards, every rank knows its own; saving them is a collective, too.
        flag = torch.tensor(int(broken), device=trainer.args.device)
        broken = bool(trainer.accelerator.reduce(flag, reduction="sum"))
    if broken:
        raise FloatingPointError(
            _message(trainer, "finite weights to save, got some that are infinite or not a number")
        )


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """Whether all weights that require a gradient are finite; of shards, those of this rank."""
    found = []
    for weight in model.parameters():
        local = weight.to_local() if isinstance(weight, DTensor) else own_piece(weight)
        if weight.requires_grad and local.numel() and not local.is_meta:
            # Infinities and NaN come out of it, and no mask as large as the weight is made.
            found.append(torch.stack(torch.aminmax(local.detach())).isfinite().all())
    devices = {flag.device for flag in found}
    return all(
        bool(torch.stack([flag for flag in found if flag.device == device]).all())
        for device in devices
    )


def _message(trainer: Any, what: str) -> str:
    step, output_dir = trainer.state.global_step, str(trainer.args.output_dir)
    last = last_complete(output_dir)
    kept = "no checkpoint was written before"
    if last is not None:
        kept = f"{last} is the last good checkpoint, and can be the model of a new run"
    return f"step {step}: expected {what}; training was stopped, and {kept}. {_ADVICE}"
