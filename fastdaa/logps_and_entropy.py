"""Token log-probs and entropies with one gradient for both: a policy loss with an entropy bonus."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.compiled_logps_and_entropy import compiled_logps_and_entropy
from fastdaa.head import LmHead
from fastdaa.logps import head_logps_and_stats
from fastdaa.validation import check_choice, check_head_inputs

_IMPLS = ("auto", "score", "recompute")


def token_logps_and_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of every target, and entropy of the distribution that it comes from.

    Both are differentiable towards ``hidden_states``, ``weight`` and ``bias``. Backward computes
    the logits once for the two, whatever the loss has of either: 3U where the head is not trained,
    else 4U (1U without gradient), where :func:`fastdaa.token_logps` and
    :func:`fastdaa.token_entropy` one after the other take 4U and 8U.

    Args:
        hidden_states: ``[N, D]`` fp16, bf16, fp32 or fp64.
        weight: ``[V, D]`` of the head, the whole vocabulary.
        targets: ``[N]`` int64 token ids in ``[0, V)``.
        bias, softcap, logit_scale, temperature: as in :func:`fastdaa.token_logps`.
        impl: ``"auto"``, ``"score"`` (no gradient) or ``"recompute"``.
        engine, max_bytes: as in :func:`fastdaa.token_logps`.

    Returns:
        Log-probs ``[N]`` and entropies ``[N]`` (from 0 to ``log(V)``), in nats; fp32 (fp64 if an
        input is fp64).

    Raises:
        TypeError, ValueError: inputs of a wrong dtype, shape or device, or an ``impl`` or
            ``engine`` that cannot serve this call.
        ImportError: ``engine="triton"`` or ``"fused"`` without the package triton.
    """
    check_choice("impl", impl, _IMPLS)
    check_head_inputs(hidden_states, weight, targets, bias)
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    call = (hidden_states, head, targets)
    if torch.compiler.is_compiling():
        return compiled_logps_and_entropy(*call, impl=impl, engine=engine, max_bytes=max_bytes)
    logps, stats = head_logps_and_stats(
        *call, stats=True, bonus=True, impl=impl, engine=engine, max_bytes=max_bytes
    )
    assert stats is not None
    return logps, stats.entropy
