"""Bases in 4 or 8 bits under LoRA (QLoRA, arXiv 2305.14314), quantised by bitsandbytes.

Linear layers hold codes instead of weights; embeddings, norms and the LM head stay as they are, and
so the head takes its usual path for frozen weights. Codes cannot be trained: adapters are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastdaa.train.backbone import causal_lm
from fastdaa.validation import check_choice

QUANT_TYPES = ("nf4", "fp4")
_REPEATED = "bitsandbytes.autograd._functions"


@dataclass
class QuantizationOptions:
    """How the base under an adapter is loaded; the names are those of TRL's ``ModelConfig``."""

    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise the base under LoRA to 4 bits (QLoRA)."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Quantise the base under LoRA to 8 bits (LLM.int8())."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4",
        metadata={"help": "Which 16 values 4 bits stand for.", "choices": QUANT_TYPES},
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the scales of 4-bit blocks, too."}
    )

    @property
    def quantizes(self) -> str | None:
        """The option that quantises the base, or None."""
        chosen = (name for name in ("load_in_4bit", "load_in_8bit") if getattr(self, name))
        return next(chosen, None)

    def check_quantization(self) -> None:
        """Raise ``ValueError`` for options of these that do not fit together."""
        check_choice("bnb_4bit_quant_type", self.bnb_4bit_quant_type, QUANT_TYPES)
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError(
                "load_in_8bit: expected one of load_in_4bit and load_in_8bit, got both"
            )
        if self.load_in_4bit:
            return
        for name, default in (("bnb_4bit_quant_type", "nf4"), ("use_bnb_nested_quant", False)):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}: expected load_in_4bit beside it, got {getattr(self, name)!r} alone"
                )

    def quantization_config(self, dtype: torch.dtype) -> Any:
        """A ``transformers.BitsAndBytesConfig``.

        Args:
            dtype: what products of 4-bit weights are computed in.
        """
        from transformers import BitsAndBytesConfig

        if self.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether linear layers of a model of transformers hold codes, in whatever wrapping."""
    return getattr(causal_lm(model), "quantization_method", None) is not None


def quantization_of(model: nn.Module) -> str | None:
    """How a model is quantised, in words that are the same for the same way; None if it is not."""
    if not is_quantized(model):
        return None
    return describe(causal_lm(model).config.quantization_config)


def describe(config: Any) -> str:
    """A ``quantization_config`` in words, from an object or a dictionary."""
    read: dict[str, Any] = dict(config if isinstance(config, dict) else config.to_dict())
    method = read.get("quant_method")
    method = str(getattr(method, "value", method))
    if method != "bitsandbytes":
        return f"{method} {read['bits']}-bit" if "bits" in read else method
    if read.get("load_in_8bit"):
        return "bitsandbytes 8-bit"
    nested = ", nested" if read.get("bnb_4bit_use_double_quant") else ""
    computed = read.get("bnb_4bit_compute_dtype") or "float32"
    return f"bitsandbytes 4-bit {read.get('bnb_4bit_quant_type')}{nested}, computed in {computed}"


def stored_quantization(source: str, **options: Any) -> str | None:
    """How the weights in a folder or on the hub are quantised; only the configuration is read.

    Args:
        source: a folder or hub id.
        options: of ``from_pretrained``, such as ``revision``.

    Raises:
        OSError: there is no configuration.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(source, **options)
    # A multimodal model may say so of its text part.
    for part in (config, config.get("text_config") or {}):
        if part.get("quantization_config"):
            return describe(part["quantization_config"])
    return None


def check_adapted(model: nn.Module, *, adapted: bool) -> None:
    """Raise ``ValueError`` for a quantised model without adapters."""
    if is_quantized(model) and not adapted:
        raise ValueError(
            f"model: expected adapters on a quantised model ({quantization_of(model)}), got none; "
            "its weights cannot be trained themselves: train LoRA (use_peft, peft_config), or load "
            "it unquantised"
        )


def compute_as_in_training(model: nn.Module) -> None:
    """Have the layers of bitsandbytes compute the same in evaluation as in training.

    In eval mode without gradient, on a CPU, ``Linear4bit`` rounds its scales to bf16 and packs its
    codes for another kernel, for good and without a gradient from then on, and ``Linear8bitLt``
    rounds its inputs. A reference, scored in eval mode, would then differ from a policy that it is
    equal to, and training would go on without the gradients of all layers below.

    Raises:
        ValueError: that has happened to the model already.
    """
    if not is_quantized(model) or not _is_bitsandbytes(model):
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    _say_once(logging.getLogger(_REPEATED))
    for name, module in model.named_modules():
        if not isinstance(module, (Linear4bit, Linear8bitLt)):
            continue
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"model: expected 4-bit weights as they were loaded, {name} was run in eval mode, "
                "for which bitsandbytes packs them anew and cannot train them any more; load the "
                "model again"
            )
        if _in_training not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_in_training)


def _in_training(module: nn.Module, _: Any) -> None:
    # These layers have no dropout: the flag decides nothing but the kernel.
    module.training = True


def _is_bitsandbytes(model: nn.Module) -> bool:
    method = getattr(causal_lm(model), "quantization_method", None)
    return str(getattr(method, "value", method)) == "bitsandbytes"


class _Once(logging.Filter):
    """Lets a message through the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self.said
        self.said.add(text)
        return new


def _say_once(logger: logging.Logger) -> None:
    """LLM.int8() says in every product of every layer that it casts its inputs to fp16."""
    if not any(isinstance(held, _Once) for held in logger.filters):
        logger.addFilter(_Once())
