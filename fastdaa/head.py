"""The LM head: hidden states to logits, and how to find it on a Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdaa.head_config import read_head_config
from fastdaa.outputs import short
from fastdaa.validation import check_floating, check_number, check_positive, check_shape
from fastdaa.vocab_shard import VocabShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# These transform the hidden states between the backbone and the output embedding, or pick logits.
_NOT_LINEAR = ("electra", "gemma4_assistant", "gemma4_unified_assistant", "prophetnet")


@dataclass(frozen=True, eq=False)
class LmHead:
    """``logits = cap(logit_scale * (hidden_states @ weight.T + bias)) / temperature``.

    ``cap(z) = softcap * tanh(z / softcap)``, or nothing where ``softcap`` is None.

    Args:
        weight: ``[V, D]``, any floating dtype.
        bias: ``[V]``, or None.
        softcap: final logit soft-capping (Gemma 2), or None.
        logit_scale: factor on the logits before the cap (Cohere, Granite, ...).
        temperature: divisor of the logits after the cap.
        shard: which slice of the vocabulary weight and bias are; None where they are all of it.

    Raises:
        TypeError, ValueError: tensors of a wrong dtype or shape, or a setting out of range.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    shard: VocabShard | None = None

    def __post_init__(self) -> None:
        check_floating("weight", self.weight)
        if self.weight.ndim != 2:
            raise ValueError(f"weight: expected shape [V, D], got {list(self.weight.shape)}")
        if self.bias is not None:
            check_floating("bias", self.bias)
            check_shape("bias", self.bias, (self.weight.shape[0],))
        for name, value in check_settings(self.softcap, self.logit_scale, self.temperature).items():
            object.__setattr__(self, name, value)
        if self.shard is not None:
            self.shard.check(self.weight.shape[0])

    def __repr__(self) -> str:
        """Shapes and settings; a matrix of numbers would say nothing."""
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.shard is None:
            del settings["shard"]
        return f"LmHead({', '.join(f'{name}={short(v)}' for name, v in settings.items())})"

    @property
    def vocab_size(self) -> int:
        """``V``."""
        return self.width if self.shard is None else self.shard.vocab_size

    @property
    def width(self) -> int:
        """Rows of the weight: ``V``, or this process's part of it."""
        return self.weight.shape[0]

    @property
    def planned_width(self) -> int:
        """The width that tiles are planned for, the same on every process of a shard.

        Raises:
            ValueError: see :meth:`VocabShard.planned_width`.
        """
        return self.width if self.shard is None else self.shard.planned_width(self.width)

    @property
    def first_token(self) -> int:
        """Token id of the weight's first row."""
        return 0 if self.shard is None else self.shard.start

    @property
    def trained(self) -> bool:
        """Whether a gradient for the weight or the bias is wanted."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def detach(self) -> LmHead:
        """The same head without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def settings(self) -> LmHead:
        """The same head without weights ``[0, D]``, for a backward pass that saves them itself."""
        # A slice of the weight would hold its memory, which ZeRO-3 gives back in between.
        return replace(self, weight=self.weight.new_empty((0, self.weight.shape[1])), bias=None)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """All logits of ``hidden_states [..., D]``, ``[..., V]``, in the inputs' promoted dtype
        (those of this process's slice where the vocabulary is split)."""
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        z = hidden_states.to(dtype) @ self.weight.to(dtype).T
        if self.bias is not None:
            z = z + self.bias.to(dtype)
        z = z * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature

    @classmethod
    def from_model(cls, model: PreTrainedModel, *, temperature: float = 1.0) -> LmHead:
        """The head of a Hugging Face causal LM (or a PEFT model around one), as it is right now.

        Call it anew in every forward: inside ``disable_adapter()`` or under a sharded engine the
        weight in force is another one. A LoRA adapter on the head is folded in, with gradients
        (one ``[V, D]`` temporary in the dtype of the head: a small update
        of a bf16 head is rounded as merging it would).

        Args:
            model: a model with output embeddings. Softcap and scale are read from its config:
                ``final_logit_softcapping`` (Gemma family), ``logits_soft_cap`` (RecurrentGemma),
                ``output_logit_soft_cap`` (xLSTM), ``logit_scale`` (Cohere),
                ``lm_head_multiplier`` (Falcon-H1), ``output_multiplier`` (Muse) and
                ``logits_scaling`` (Granite and MiniCPM3 divide, HyperCLOVA-X multiplies),
                ``logits_mup_width_multiplier`` and ``unpadded_vocab_size`` (Inkling). Of the text
                config of a multimodal model only what that model itself applies.
            temperature: divisor of the logits.

        Raises:
            TypeError: not a Hugging Face model, or one inside a wrapper such as DDP.
            ValueError: the model has no head, or one this library does not know how to reproduce.
        """
        module, owner = _head_module(model)
        weight, bias = _head_tensors(module, type(model).__name__)
        softcap, logit_scale, real = read_head_config(model.config, owner)
        if real is not None and real < weight.shape[0]:
            weight, bias = weight[:real], None if bias is None else bias[:real]
        return cls(weight, bias, softcap, logit_scale, temperature)


def check_settings(
    softcap: object, logit_scale: object, temperature: object
) -> dict[str, float | None]:
    """The numbers of a head by their names, as floats.

    Raises:
        TypeError: something else than numbers of Python or NumPy.
        ValueError: a softcap or temperature not above 0, a scale of 0, or one that is not finite.
    """
    scale = check_number("logit_scale", logit_scale)
    if scale == 0.0:
        raise ValueError("logit_scale: expected a number other than 0, got 0.0")
    if temperature is None:
        raise TypeError("temperature: expected a number, got NoneType")
    return {
        "softcap": check_positive("softcap", softcap),
        "logit_scale": scale,
        "temperature": check_positive("temperature", temperature),
    }


def _head_module(model: PreTrainedModel) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The output embedding, if the model applies it to its last hidden states as they are, and the
    model that it belongs to, this one or one inside it."""
    name = type(model).__name__
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        inside = " (give the model inside, its `module`)" if hasattr(model, "module") else ""
        raise TypeError(f"model: expected a Hugging Face causal LM, got {name}{inside}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: expected a causal LM, got an encoder-decoder model")
    module = model.get_output_embeddings()
    if module is None:
        raise ValueError(
            f"{name}: expected a causal LM with output embeddings, got None from "
            "get_output_embeddings()"
        )
    base_of_peft = getattr(model, "get_base_model", None)
    owner = _owner(model if base_of_peft is None else base_of_peft(), module)
    if model.config.model_type in _NOT_LINEAR or owner is None:
        raise ValueError(
            f"{name}: expected logits that are one product of the last hidden states with the "
            "output embedding, got a head with further layers"
        )
    return module, owner


def _owner(model: torch.nn.Module, module: torch.nn.Module) -> torch.nn.Module | None:
    """The model that has ``module`` itself, and not in a prediction head inside it; or None."""
    children = list(model.children())
    if any(child is module for child in children):
        return model if getattr(model, "lm_head", module) is module else None
    models = [child for child in children if hasattr(child, "get_output_embeddings")]
    return next((owner for child in models if (owner := _owner(child, module)) is not None), None)


def _head_tensors(module: torch.nn.Module, model_name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in force of an output embedding, a PEFT wrapper around it included."""
    # PEFT's wrappers for whole modules and single tokens forward `weight` to the copy in force; its
    # adapter layers forward it to the frozen layer, and what they add has to be added here.
    if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
        return _adapted_tensors(module, model_name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(
            f"{model_name}: expected an output embedding with a weight of shape [V, D], got "
            f"{type(module).__name__}"
        )
    # Codes of 4 bits may be stored as if they were floating-point numbers.
    packed = getattr(weight, "quant_state", None) is not None
    if packed or not weight.is_floating_point():
        stored = f"{type(module).__name__} with {weight.dtype}"
        raise ValueError(
            f"{model_name}: expected a floating-point head, got a quantised one ({stored}); leave "
            "it out of the quantisation (llm_int8_skip_modules=['lm_head'])"
        )
    if weight.numel() == 0:
        raise ValueError(
            f"{model_name}: the head's weight is empty here; a sharded parameter (DeepSpeed "
            "ZeRO-3) has to be gathered around the forward"
        )
    bias = getattr(module, "bias", None)
    return weight, bias if isinstance(bias, Tensor) else None


def _adapted_tensors(module: Any, model_name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a PEFT layer around an output embedding, LoRA folded in."""
    if module.disable_adapters and module.merged:
        module.unmerge()  # as the layer's own forward does
    weight, bias = _head_tensors(module.base_layer, model_name)
    if module.disable_adapters or module.merged:
        return weight, bias
    if not hasattr(module, "lora_A"):
        kind = type(module).__module__.split(".")[-2]
        raise ValueError(f"{model_name}: expected plain LoRA on the LM head, got {kind}")
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            _check_foldable(module, adapter, model_name)
            weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
    return weight, bias


def _check_foldable(module: Any, adapter: str, model_name: str) -> None:
    """Raise unless a LoRA adapter is the product of two matrices and nothing else."""
    if not isinstance(module.lora_dropout[adapter], torch.nn.Identity):
        raise ValueError(
            f"{model_name}: expected lora_dropout 0 on the LM head, because the head is used as "
            "one matrix"
        )
    variant = "DoRA" if module.use_dora.get(adapter, False) else None
    if variant is None and adapter in getattr(module, "lora_variant", {}):
        variant = type(module.lora_variant[adapter]).__name__
    if getattr(module, "lora_bias", {}).get(adapter, False):
        variant = "lora_bias"
    if variant is not None:
        raise ValueError(f"{model_name}: expected plain LoRA on the LM head, got {variant}")
