"""The LM head: hidden states to logits, and how to find it on a Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdaa.validation import check_floating, check_positive, check_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PretrainedConfig, PreTrainedModel

# Config fields that hold a factor on the logits, by what the model does with it.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# `logits_scaling` divides in most families; these multiply.
_SCALING_MULTIPLIES = ("hyperclovax",)
_DIVISORS = ("logits_mup_width_multiplier",)
# These have a `logit_scale` in their config and do not use it.
_SCALE_UNUSED = ("mpt",)
# These transform the hidden states between the backbone and the output embedding, or pick logits.
_NOT_LINEAR = ("electra", "gemma4_assistant", "gemma4_unified_assistant", "prophetnet")


@dataclass(frozen=True)
class VocabShard:
    """Which tokens the rows of a head are, where every process of a group has a slice of them.

    All processes hold the same hidden states and targets and make the same calls in the same order.
    Log-probs, losses and gradients of the hidden states come out whole on each of them, gradients
    of weight and bias are those of its slice.
    """

    start: int
    """Token id of the first row."""
    vocab_size: int
    """``V`` of all processes together."""
    group: ProcessGroup | None = None
    """The processes; None for all."""


@dataclass(frozen=True)
class LmHead:
    """``logits = cap(logit_scale * (hidden_states @ weight.T + bias)) / temperature``.

    ``cap(z) = softcap * tanh(z / softcap)``, or nothing where ``softcap`` is None.
    """

    weight: Tensor
    """``[V, D]``, any floating dtype."""
    bias: Tensor | None = None
    """``[V]``, or None."""
    softcap: float | None = None
    """Final logit soft-capping (Gemma 2), or None."""
    logit_scale: float = 1.0
    """Factor on the logits before the cap (Cohere, Granite, ...)."""
    temperature: float = 1.0
    """Divisor of the logits after the cap."""
    shard: VocabShard | None = None
    """Weight and bias are a slice of the vocabulary, or None where they are all of it."""

    def __post_init__(self) -> None:
        check_floating("weight", self.weight)
        if self.weight.ndim != 2:
            raise ValueError(f"weight: expected shape [V, D], got {list(self.weight.shape)}")
        if self.bias is not None:
            check_floating("bias", self.bias)
            check_shape("bias", self.bias, (self.weight.shape[0],))
        check_positive("softcap", self.softcap)
        check_positive("temperature", self.temperature)
        if not isinstance(self.logit_scale, (int, float)) or self.logit_scale == 0.0:
            raise ValueError(f"logit_scale: expected a number other than 0, got {self.logit_scale}")
        if self.shard is not None:
            _check_shard(self.shard, self.weight.shape[0])

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
        """The width that tiles are planned for: the same on every process, whose slices may differ
        by a few rows, because they reduce statistics together tile by tile."""
        if self.shard is None:
            return self.width
        return -(-self.vocab_size // torch.distributed.get_world_size(self.shard.group))

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
                ``logits_mup_width_multiplier`` and ``unpadded_vocab_size`` (Inkling).
            temperature: divisor of the logits.

        Raises:
            ValueError: the model has no head, or one this library does not know how to reproduce.
        """
        weight, bias = _head_tensors(_head_module(model), type(model).__name__)
        softcap, logit_scale = _read_config(model.config)
        real = getattr(model.config.get_text_config(), "unpadded_vocab_size", None)
        if real is not None and real < weight.shape[0]:
            weight, bias = weight[:real], None if bias is None else bias[:real]
        return cls(weight, bias, softcap, logit_scale, temperature)


def _check_shard(shard: VocabShard, rows: int) -> None:
    if not 0 <= shard.start <= shard.start + rows <= shard.vocab_size:
        raise ValueError(
            f"shard: expected {rows} rows from token {shard.start} to lie within a vocabulary of "
            f"{shard.vocab_size}"
        )


def _head_module(model: PreTrainedModel) -> torch.nn.Module:
    """The output embedding, if the model applies it to its last hidden states as they are."""
    name = type(model).__name__
    module = model.get_output_embeddings()
    if module is None:
        raise ValueError(
            f"{name}: expected a causal LM with output embeddings, got None from "
            "get_output_embeddings()"
        )
    base_of_peft = getattr(model, "get_base_model", None)
    owner = model if base_of_peft is None else base_of_peft()
    if model.config.model_type in _NOT_LINEAR or not _is_last_step(owner, module):
        raise ValueError(
            f"{name}: expected logits that are one product of the last hidden states with the "
            "output embedding, got a head with further layers"
        )
    return module


def _is_last_step(owner: torch.nn.Module, module: torch.nn.Module) -> bool:
    """Whether ``module`` belongs to a model itself, and not to a prediction head inside it."""
    children = list(owner.children())
    if any(child is module for child in children):
        return getattr(owner, "lm_head", module) is module
    models = [child for child in children if hasattr(child, "get_output_embeddings")]
    return any(_is_last_step(child, module) for child in models)


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
    if not weight.is_floating_point():
        raise ValueError(
            f"{model_name}: expected a floating-point head, got {weight.dtype}; exclude lm_head "
            "from quantisation (llm_int8_skip_modules=['lm_head'])"
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


def _read_config(config: PretrainedConfig) -> tuple[float | None, float]:
    """Softcap and logit multiplier of a model config."""
    text = config.get_text_config()
    softcap = None
    for field in _SOFTCAPS:
        softcap = getattr(text, field, None) or softcap
    scale = 1.0
    for field in _MULTIPLIERS:
        value = None if text.model_type in _SCALE_UNUSED else getattr(text, field, None)
        if isinstance(value, (int, float)):
            scale *= value
        elif value is not None:
            raise ValueError(
                f"{text.model_type}: expected config.{field} to be a number, got {value!r}"
            )
    for field in _DIVISORS:
        scale /= getattr(text, field, 1.0)
    scaling = getattr(text, "logits_scaling", None)
    if scaling is not None:
        scale = scale * scaling if text.model_type in _SCALING_MULTIPLIES else scale / scaling
    return softcap, float(scale)
