"""Running the head's work inside a model's forward, on hidden states instead of logits.

FSDP and DeepSpeed gather parameters around a module's ``forward``. Work on the LM head weight has
to happen there, or it meets an empty or sharded tensor and its gradient is not reduced. So the
model's own ``forward`` is taught one more keyword, ``head_task``: a function that receives the
hidden states while the parameters are there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdaa.train.attention import placeholder_mask
from fastdaa.train.balance import balance_of, load_balancing_loss
from fastdaa.train.zero3 import call_as, holds_cut

HeadTask = Callable[[Tensor], Any]
"""From hidden states ``[R, L, D]``, after the final norm, to anything made of tensors."""

BACKBONE_CALL = "_fastdaa_backbone_call"
"""Attribute of a model under which another way to call its backbone may be put, see
:mod:`fastdaa.train.compilation`."""
_MARK = "_fastdaa_previous_forward"


class BackboneOutput(NamedTuple):
    """What a forward with a head task returns."""

    result: Any
    """What the head task returned."""
    aux_loss: Tensor | None
    """Scalar load-balancing loss of a mixture of experts for which
    :func:`fastdaa.train.balance.balance_of` has a weight, over the tokens of the batch as they lie
    there (a shared prompt counts once), not yet weighted. Else ``None``."""


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers of PEFT, DDP, FSDP or ``torch.compile``.

    Raises:
        TypeError: there is none.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            continue
        for name in ("module", "_orig_mod", "_fsdp_wrapped_module"):
            if isinstance(getattr(inner, name, None), nn.Module):
                inner = getattr(inner, name)
                break
        else:
            raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    return inner


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that ends in the hidden states the head reads.

    For a multimodal model it is the text decoder: text goes in without the vision tower.

    Raises:
        TypeError: the model has no separate backbone.
    """
    multimodal = getattr(model.config, "vision_config", None) is not None
    backbone = model.get_decoder() if multimodal else model.base_model
    if backbone is model or getattr(backbone, "lm_head", None) is not None:
        # Llama 4's text model names a part that only its multimodal one has, and that one holds
        # it with its head.
        backbone = getattr(backbone, "model", None)
    if not isinstance(backbone, nn.Module):
        raise TypeError(
            f"expected a causal language model with a backbone under its head, got "
            f"{type(model).__name__}, whose base_model is itself"
        )
    return backbone


def install_head_task(model: nn.Module) -> PreTrainedModel:
    """Teach the forward of the model inside ``model`` the keyword ``head_task``.

    Without the keyword the forward is what it was. Weights, configuration and saved files do not
    change; a deep copy keeps the keyword, an unpickled model has lost it (install it again).
    Before or after PEFT, gradient checkpointing and sharding makes no difference.

    Returns:
        The model whose forward was changed.
    """
    target = causal_lm(model)
    backbone_of(target)
    if has_head_task(target):
        return target
    previous = vars(target).get("forward")
    if previous is None:
        inner = type(target).forward
    elif getattr(previous, "__self__", None) is target:
        inner = previous.__func__
    else:
        inner = _ignoring_self(previous)

    def forward(self: PreTrainedModel, *args: Any, head_task: Any = None, **kwargs: Any) -> Any:
        if head_task is None:
            return inner(self, *args, **kwargs)
        if args:
            raise TypeError("expected keyword arguments only together with head_task")
        return _forward_with_head_task(self, head_task, kwargs)

    forward.__doc__ = inner.__doc__
    # Not __wrapped__: accelerate follows it when it unwraps a model and would skip this function.
    forward.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
    setattr(forward, _MARK, previous)
    target.forward = MethodType(forward, target)
    return target


def remove_head_task(model: nn.Module) -> None:
    """Give the model inside ``model`` back the forward that it had; nothing if it has it.

    Raises:
        RuntimeError: something else has wrapped the forward since.
    """
    target = causal_lm(model)
    if not has_head_task(target):
        return
    if not hasattr(target.forward, _MARK):
        raise RuntimeError(
            f"expected the forward that install_head_task left on {type(target).__name__}, got "
            "one that something else has wrapped since; undo that first"
        )
    previous = getattr(target.forward, _MARK)
    del target.forward
    if previous is not None:
        target.forward = previous


def has_head_task(model: nn.Module) -> bool:
    """Whether the model inside ``model`` knows ``head_task``."""
    forward: Any = causal_lm(model).forward
    while forward is not None:
        if hasattr(forward, _MARK):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def run_head_task(model: nn.Module, pack: Mapping[str, Any], head_task: HeadTask) -> BackboneOutput:
    """Run the backbone on a pack, and ``head_task`` on its hidden states, inside ``model``.

    Args:
        model: any wrapping of a model with ``install_head_task``.
        pack: ``input_ids`` and ``position_ids`` ``[R, L]``; ``segments`` if the row is packed,
            else ``attention_mask`` ``[R, L]`` of rows padded on the right, whose positions are the
            model's own, or for a dense mask 4-D or a dictionary.
        head_task: from ``[R, L, D]`` hidden states to its result.

    Raises:
        RuntimeError: ``install_head_task`` was not called.
    """
    if not has_head_task(model):
        raise RuntimeError("expected a model with a head task, got one without install_head_task")
    names = ("input_ids", "position_ids", "attention_mask", "segments")
    inputs = {name: pack[name] for name in names if pack.get(name) is not None}
    if _is_padded(inputs):
        # Padded on the right, so that the model knows them itself; some do not begin with 0.
        inputs.pop("position_ids", None)
    return model(**inputs, use_cache=False, head_task=head_task)


def _is_padded(inputs: Mapping[str, Any]) -> bool:
    mask = inputs.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2


def _ignoring_self(function: Callable[..., Any]) -> Callable[..., Any]:
    def inner(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    inner.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *inspect.signature(function).parameters.values(),
        ]
    )
    inner.__doc__ = function.__doc__
    return inner


def _forward_with_head_task(
    model: PreTrainedModel, head_task: HeadTask, kwargs: Mapping[str, Any]
) -> BackboneOutput:
    """The changed forward; ``model`` is the object that was called, so that copies work."""
    # PEFT passes its optional arguments along as None.
    inputs = {name: value for name, value in kwargs.items() if value is not None}
    if "labels" in inputs or "logits_to_keep" in inputs:
        raise ValueError("expected neither labels nor logits_to_keep together with head_task")
    if "segments" in inputs and "attention_mask" not in inputs:
        inputs["attention_mask"] = placeholder_mask(inputs["input_ids"])
    inputs.setdefault("use_cache", False)
    balanced = balance_of(model) is not None
    if balanced:
        inputs["output_router_logits"] = True
    inputs.pop("return_dict", None)
    backbone, call = backbone_of(model), getattr(model, BACKBONE_CALL, None)
    outputs = backbone(**inputs) if call is None else call(backbone, inputs)
    aux_loss = load_balancing_loss(model, outputs, inputs) if balanced else None
    head: Any = model.get_output_embeddings()
    if head is not None and holds_cut(head):
        return BackboneOutput(call_as(head, head_task, outputs.last_hidden_state), aux_loss)
    return BackboneOutput(head_task(outputs.last_hidden_state), aux_loss)
