"""PEFT adapters: the policy with its adapter off, or as it was before training."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastdaa.counted import counted

REF_ADAPTER = "fastdaa_ref"
"""Name of the frozen copy of an adapter that was trained before."""
_OTHER_FORWARDS = {
    "ADAPTION_PROMPT": "replaces the forward of the attention",
    "LILY": "mixes all tokens of a batch",
    "SHADOW": "has a forward pass of its own",
    "XLORA": "runs the model twice",
}
"""Kinds of adapters under which log-probs of packed sequences cannot be had, and why."""


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return bool(getattr(model, "peft_config", None))


def adapter_words(model: nn.Module) -> str | None:
    """What the adapter of a model is, with rank and layers of LoRA; None without one."""
    if not is_adapted(model):
        return None
    inner = peft_model(model)
    config = inner.peft_config[inner.active_adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type)).replace("LORA", "LoRA")
    if getattr(config, "r", None) is None:
        return kind
    words = f"{kind}, rank {config.r}"
    for name, value in (
        ("alpha", getattr(config, "lora_alpha", None)),
        ("dropout", getattr(config, "lora_dropout", None)),
    ):
        words += f", {name} {value:g}" if value is not None else ""
    for option, name in (("use_rslora", "rank-stabilised"), ("use_dora", "DoRA")):
        words += f", {name}" if getattr(config, option, False) else ""
    layers = config.target_modules
    if isinstance(layers, str):
        return f"{words}, on {layers}"
    named = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers or ()}))
    return f"{words}, on {named}" if named else words


def adapter_dropout(model: nn.Module) -> float:
    """The largest dropout probability that the configurations of a model's adapters ask for."""
    if not is_adapted(model):
        return 0.0
    configs = peft_model(model).peft_config.values()
    return max(float(getattr(config, "lora_dropout", 0.0) or 0.0) for config in configs)


def check_adapters(model: nn.Module) -> None:
    """Raise ``ValueError`` for adapters whose start cannot be scored, that are merged into their
    base, or that shift positions."""
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            f"model: expected adapters in a peft.PeftModel, got a {type(model).__name__} that "
            "manages them itself; give the adapter's folder as the model, or use "
            "peft.PeftModel.from_pretrained"
        )
    name = getattr(model, "active_adapter", None)
    if not isinstance(name, str):
        raise ValueError(f"model: expected one active adapter, got {name}")
    # PEFT computes such layers with their base alone: nothing would have a gradient.
    merged = {name for part in model.modules() for name in getattr(part, "merged_adapters", ())}
    if merged:
        raise ValueError(
            "model: expected adapters beside their base, got merged ones "
            f"({', '.join(sorted(merged))}); call unmerge_adapter(), or merge_and_unload() to keep "
            "them in the base"
        )
    check_prompt_learning(model.peft_config[name])  # type: ignore[index]


def check_frozen_base(model: Any) -> None:
    """Raise ``ValueError`` where the policy is more than a frozen base and one adapter.

    A base that is trained would move away from the starting point, and the reference with it; a
    second active adapter would be missing in the reference.
    """
    active = list(model.active_adapters)
    if len(active) > 1:
        raise ValueError(
            "model: expected one active adapter, since the reference is the model without it, got "
            f"{', '.join(active)}; merge the others into the base, or give a ref_model"
        )
    moved = trained_base(model)
    if moved:
        raise ValueError(
            "model: expected a frozen base under the adapter, since the base is the reference, got "
            f"{counted(len(moved), 'trained weight')} of it, {moved[0]} first (as bias='all' of a "
            "LoraConfig has it); freeze them or give a ref_model"
        )


def trained_base(model: Any) -> list[str]:
    """Names of the weights of a PEFT model that are trained and are not its adapter's."""
    own = _weights(model, model.active_adapter)
    return [name for name, p in model.named_parameters() if p.requires_grad and name not in own]


def check_prompt_learning(config: Any) -> None:
    """Raise ``ValueError`` for the configuration of an adapter that shifts positions, or runs the
    model in a way of its own."""
    kind = config.peft_type.value
    why = _OTHER_FORWARDS.get(kind)
    if config.is_prompt_learning:
        why = "puts virtual tokens in front of the sequences"
    if why is not None:
        raise ValueError(
            f"model: expected an adapter of weights such as LoRA, got {kind}, which {why}"
        )


def peft_model(model: nn.Module) -> Any:
    """The PEFT model inside wrappers of DDP and the like."""
    inner: Any = model
    while not hasattr(inner, "disable_adapter"):
        inner = inner.module
    return inner


@contextlib.contextmanager
def starting_point(model: nn.Module) -> Iterator[None]:
    """The PEFT model inside ``model`` as it was before training, in eval mode.

    That is its frozen copy of the adapter, or no adapter. For LoRA only the flags of the layers are
    switched: PEFT's own ways also walk over all parameters, which takes tens of milliseconds in a
    large model, twice a step.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    peft = peft_model(model)
    flag, value = "_disable_adapters", True
    if REF_ADAPTER in peft.peft_config:
        flag, value = "_active_adapter", [REF_ADAPTER]  # type: ignore[assignment]
    with contextlib.ExitStack() as stack:
        if _is_lora(peft):
            layers = [module for module in modules if hasattr(module, flag)]
            stack.enter_context(_switched(layers, flag, value))
        elif flag == "_active_adapter":
            stack.enter_context(_activated(peft))
        else:
            stack.enter_context(peft.disable_adapter())
        stack.enter_context(_switched(training, "training", False))
        yield


def is_fresh(model: Any) -> bool:
    """Whether a LoRA adapter changes nothing yet, since its ``B`` is zero."""
    weights = _weights(model, model.active_adapter)
    outputs = [p for key, p in weights.items() if "lora_B" in key or "lora_embedding_B" in key]
    return bool(outputs) and not any(bool(p.detach().any()) for p in outputs)


def keep_starting_adapter(model: Any) -> bool:
    """Copy a trained adapter, so that the policy can be compared with where it started.

    A fresh LoRA adapter changes nothing (its ``B`` is zero): switching it off is the same and
    costs no memory.

    Returns:
        Whether a copy was made.
    """
    name = model.active_adapter
    if REF_ADAPTER in model.peft_config:
        # Left by an earlier trainer of this model, whose starting point was another one.
        model.delete_adapter(REF_ADAPTER)
    if is_fresh(model):
        return False
    weights = _weights(model, name)
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        # PiSSA, OLoRA and their like would take the new adapter's start out of the base weights.
        config.init_lora_weights = True
    # Done once, with the first adapter: layers that stand there several times, and biases of the
    # base (trained ones are refused), of which PEFT lets one adapter alone have any.
    if getattr(config, "layer_replication", None):
        config.layer_replication = None
    if getattr(config, "bias", "none") != "none":
        config.bias = "none"
    model.add_adapter(REF_ADAPTER, config)
    parameters = dict(model.named_parameters())
    for key, weight in weights.items():
        kept = parameters[f"{key}.".replace(f".{name}.", f".{REF_ADAPTER}.")[:-1]]
        kept.data = weight.detach().clone()
        kept.requires_grad_(False)
    return True


@contextlib.contextmanager
def saving_own_adapters(model: nn.Module) -> Iterator[None]:
    """``save_pretrained`` of the PEFT model inside ``model`` leaves the frozen copy out."""
    peft = peft_model(model)
    names = [name for name in peft.peft_config if name != REF_ADAPTER]
    peft.save_pretrained = functools.partial(peft.save_pretrained, selected_adapters=names)
    try:
        yield
    finally:
        del peft.save_pretrained


def _weights(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {key: p for key, p in model.named_parameters() if f".{adapter}." in f"{key}."}


def _is_lora(model: Any) -> bool:
    return all(config.peft_type.value == "LORA" for config in model.peft_config.values())


@contextlib.contextmanager
def _activated(model: Any) -> Iterator[None]:
    name = model.active_adapter
    model.set_adapter(REF_ADAPTER)
    try:
        yield
    finally:
        # Gradients are switched along with the adapter: the copy is frozen again.
        model.set_adapter(name)


@contextlib.contextmanager
def _switched(modules: list[nn.Module], name: str, value: Any) -> Iterator[None]:
    before = [getattr(module, name) for module in modules]
    # Past nn.Module.__setattr__, which looks for parameters and buffers first.
    for module in modules:
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            object.__setattr__(module, name, old)
