"""Weights that accelerate keeps elsewhere until their layer runs, as ``device_map`` has it."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdaa.train.backbone import causal_lm


def check_offload(model: nn.Module, name: str, *, trained: bool) -> None:
    """Refuse a model with weights elsewhere that are needed here.

    Gradients of such weights go to copies that are thrown away, and the LM head's weight is read
    outside the head's own forward. Other frozen layers may be anywhere.

    Args:
        name: of the model in messages.
        trained: whether its weights are trained where they ask for it.

    Raises:
        ValueError: weights to train, or the LM head, are offloaded.
    """
    if not any(map(_offloads, model.modules())):
        return
    core: Any = causal_lm(model)
    head = core.get_output_embeddings()
    needed = {} if head is None else {id(weight): "its LM head" for weight in head.parameters()}
    for path, weight in model.named_parameters():
        what = needed.get(id(weight)) or (path if trained and weight.requires_grad else None)
        if what is not None and weight.is_meta:
            raise ValueError(
                f"{name}: expected {'the weights to train and ' if trained else ''}the LM head on "
                f"a device, got {what} of {type(core).__name__} offloaded; load the model without "
                "device_map, or with one that leaves them there"
            )


def _offloads(module: nn.Module) -> bool:
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))
