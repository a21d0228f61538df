"""What a Hugging Face model does to the products of its head, by its config."""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# Config fields that hold a factor on the logits, by what the model does with it.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# `logits_scaling` divides in most families; these multiply.
_SCALING_MULTIPLIES = ("hyperclovax",)
_DIVISORS = ("logits_mup_width_multiplier",)
# These have a `logit_scale` in their config and do not use it.
_SCALE_UNUSED = ("mpt",)


class HeadConfig(NamedTuple):
    """What happens to the products, and how many of them are logits."""

    softcap: float | None
    logit_scale: float
    vocab_size: int | None
    """Rows of the weight that are tokens; None for all."""


def read_head_config(config: PretrainedConfig, owner: nn.Module) -> HeadConfig:
    """Of a model whose head belongs to ``owner``, itself or a model inside it.

    The text config of a multimodal model may name what its causal LM does with logits, and the
    multimodal model not do it (transformers' LLaVA with Gemma 2). So a field counts there only
    where the code of ``owner``'s class reads it.
    """
    text = config.get_text_config()
    kind: Any = type(owner)
    its_own = text is config or text is getattr(owner, "config", None)
    words = None if its_own else _words(kind)

    def read(field: str) -> Any:
        return getattr(text, field, None) if words is None or field in words else None

    softcap = None
    for field in _SOFTCAPS:
        softcap = read(field) or softcap
    scale = 1.0
    for field in _MULTIPLIERS:
        value = None if text.model_type in _SCALE_UNUSED else read(field)
        if isinstance(value, (int, float)):
            scale *= value
        elif value is not None:
            raise ValueError(
                f"{text.model_type}: expected config.{field} to be a number, got {value!r}"
            )
    for field in _DIVISORS:
        scale /= read(field) or 1.0
    scaling = read("logits_scaling")
    if scaling is not None:
        scale = scale * scaling if text.model_type in _SCALING_MULTIPLIES else scale / scaling
    return HeadConfig(softcap, float(scale), read("unpadded_vocab_size"))


@lru_cache(maxsize=64)
def _words(kind: type) -> frozenset[str] | None:
    """Those of the code of a class that makes its logits; None where there is none to read."""
    words: set[str] = set()
    for cls in kind.__mro__:
        # Those that FSDP2 makes at run time have none; that of torch's Module makes no logits.
        if "forward" not in vars(cls) or cls.__module__.startswith("torch."):
            continue
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):  # made at run time, so around the forward of another one
            continue
        words.update(re.findall(r"\w+", source))
        if not re.search(r"super\([^)]*\)\s*\.forward\(|\.forward\(\s*self\b", source):
            break
    return frozenset(words) or None
