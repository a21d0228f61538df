"""Segment attention as an attention implementation of transformers, and the dense fallback.

``enable_segments(model)`` switches a model to the implementation ``"fastdaa_segments"``. Called
with ``segments=...`` the model attends within the segments of a packed row. Called without, for
generation or a padded batch, it does what ``sdpa`` does (``eager`` where scores are soft-capped).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdaa.data.packs import dense_mask as segments_mask
from fastdaa.train.segments import segment_attention

ATTENTION_NAME = "fastdaa_segments"
"""Name under which transformers knows the implementation."""

# Arguments by which models ask for attention that segments do not have: sinks, position biases.
_UNSUPPORTED_ARGUMENTS = ("s_aux", "sinks", "position_bias", "alibi")
_PLACEHOLDER = (1, 1, 1, 1)


def register_attention() -> None:
    """Make ``ATTENTION_NAME`` known to transformers; calling it again changes nothing."""
    if ATTENTION_NAME in ALL_ATTENTION_FUNCTIONS:
        return
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    # A 4-D mask is taken as it is before this is asked, so a packed row builds no mask at all.
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def enable_segments(model: PreTrainedModel) -> str:
    """Switch ``model`` to segment attention.

    Returns:
        The attention implementation that it had, to be given to ``set_attn_implementation``.

    Raises:
        ValueError: the model does not choose its attention through transformers' registry.
    """
    register_attention()
    before = model.config._attn_implementation or "eager"
    if before != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            f"expected a model that can change its attention implementation, got "
            f"{type(model).__name__}, which does not use transformers' attention registry"
        )
    return before


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention in the form in which transformers calls it.

    Args:
        module: the attention layer.
        query: ``[R, H, L, d]``.
        key: ``[R, Hkv, K, d]``.
        value: ``[R, Hkv, K, dv]``.
        attention_mask: boolean or additive ``[R, 1, L, K]``, or ``None``; with segments only the
            placeholder or ``None``.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores.
        is_causal: overrides ``module.is_causal`` where there is no mask.
        sliding_window: a query sees that many last keys; only used with segments, since
            ``attention_mask`` holds it otherwise.
        softcap: cap of the scores, or ``None``.
        segments: the batch format's description of a packed row, see ``segment_attention``.
        kwargs: what else the model passes on.

    Returns:
        ``[R, L, H, dv]``, and attention weights where ``eager`` computed them.

    Raises:
        ValueError: the layer asks for attention that segments cannot express, or the segments of
            a packed row did not reach it.
    """
    _check_call(module, key, attention_mask, is_causal, segments, kwargs)
    if segments is None:
        if softcap is not None:
            return _eager(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap
            )
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    out = segment_attention(
        query,
        key,
        value,
        segments,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        dropout=dropout,
    )
    return out, None


def _check_call(
    module: nn.Module,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    segments: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> None:
    """Refuse a packed row whose segments got lost, and layers that segments cannot serve."""
    name = type(module).__name__
    placeholder = attention_mask is not None and tuple(attention_mask.shape) == _PLACEHOLDER
    if segments is None:
        if placeholder and key.shape[2] > 1:
            raise ValueError(
                f"expected {name} to receive the segments of the packed row, got none: its model "
                "does not hand keyword arguments down to its attention layers; "
                'use layout="padded"'
            )
        return
    asked = [option for option in _UNSUPPORTED_ARGUMENTS if options.get(option) is not None]
    if attention_mask is not None and not placeholder:
        asked.append(f"a mask of its own {tuple(attention_mask.shape)}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        asked.append("is_causal=False")
    if asked:
        raise ValueError(
            "expected causal attention without sinks, biases and masks in a packed row, got "
            f"{', '.join(asked)} from {name}"
        )


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """The model family's own eager attention, which wants an additive mask."""
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = attention_mask
    if mask is None and causal and queries > 1:
        # No mask stands for sdpa's is_causal, whose queries start at the first key.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = _additive(mask, query.dtype)
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return eager(
        module,
        query,
        key,
        value,
        mask,
        dropout=dropout,
        scaling=scaling,
        softcap=softcap,
    )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zeros, torch.finfo(dtype).min)


def placeholder_mask(input_ids: Tensor) -> Tensor:
    """Boolean ``[1, 1, 1, 1]``: a mask that transformers passes on and segment attention ignores.

    Without one, transformers would build an ``[L, L]`` mask from the restarting positions.
    """
    return input_ids.new_ones(_PLACEHOLDER, dtype=torch.bool)


def dense_mask(
    segments: Mapping[str, Any],
    length: int,
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor | dict[str, Tensor]:
    """The mask of a packed row as a dense ``attention_mask``, for models without segments.

    Memory and time grow with the square of ``length``: an explicit choice, never a default.

    Args:
        segments: the batch format's description of the packed row.
        length: ``L``, length of the row.
        config: the model's text configuration; tells which layers slide over how many keys.
        dtype: dtype of the model, for the additive mask that ``eager`` wants.

    Returns:
        ``[1, 1, L, L]``: boolean (true where a query sees a key) unless the implementation is
        ``eager``, which gets an additive one. A dictionary from layer type to mask if the model
        mixes full and sliding layers.
    """
    kinds = _layer_kinds(config)
    masks: dict[str, Tensor] = {}
    for kind in kinds:
        window = config.sliding_window if kind == "sliding_attention" else None
        seen = segments_mask(segments, length, window)
        eager = config._attn_implementation == "eager"
        masks[kind] = _additive(seen, dtype) if eager else seen
    return masks[kinds[0]] if len(kinds) == 1 else masks


def _layer_kinds(config: Any) -> list[str]:
    """Kinds of attention layers of a configuration, ``full_attention`` or ``sliding_attention``."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = getattr(config, "sliding_window", None) is not None
        return ["sliding_attention" if sliding else "full_attention"]
    return sorted(set(kinds))
