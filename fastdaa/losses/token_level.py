"""Token-level objectives: regression towards a policy tilted by advantages.

Both aim at ``ref * exp(advantage / lam)``. Every function returns one loss a token, ``[N]``; the
objective is their mean over all scored tokens of the batch. Advantages are detached: no gradient
reaches a critic from here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def apa(
    token_logps: Tensor,  # [N]
    ref_token_logps: Tensor,  # [N]
    advantages: Tensor,  # [N]
    *,
    lam: float = 0.1,
) -> Tensor:
    """Advantage-induced policy alignment (arXiv 2306.02231): the squared log-ratio error.

    ``(log policy - log ref - advantage / lam)^2``. ``lam`` is the advantage that is worth one nat.
    """
    return (token_logps - ref_token_logps - _like(advantages, token_logps) / lam).square()


def awr(
    token_logps: Tensor,  # [N]
    advantages: Tensor,  # [N]
    *,
    lam: float = 1.0,
    max_weight: float = 20.0,
) -> Tensor:
    """Advantage-weighted regression (arXiv 1910.00177): ``-exp(advantage / lam) log policy``.

    The weight is capped at ``max_weight``. Nothing anchors it to a reference.
    """
    exponent = (_like(advantages, token_logps) / lam).clamp(max=math.log(max_weight))
    return -exponent.exp() * token_logps


def apa_pairs(
    token_logps: Tensor,  # [N]
    ref_token_logps: Tensor,  # [N]
    lengths: Tensor,  # [S] int64
    *,
    lam: float = 1.0,
    advantages: Tensor | None = None,  # [S]
) -> Tensor:
    """APA offline on pairs: every token carries the advantage of its sequence.

    Sequences are pair-major. Without ``advantages`` a chosen completion has +1 and a rejected one
    -1. ``lam`` defaults to 1 as in the authors' offline runs: at 0.1 each single token would have
    to move by 10 nats.
    """
    return apa(token_logps, ref_token_logps, _per_token(token_logps, lengths, advantages), lam=lam)


def awr_pairs(
    token_logps: Tensor,  # [N]
    ref_token_logps: Tensor | None,  # [N], not read
    lengths: Tensor,  # [S] int64
    *,
    lam: float = 1.0,
    max_weight: float = 20.0,
    advantages: Tensor | None = None,  # [S]
) -> Tensor:
    """AWR offline on pairs, with advantages as in ``apa_pairs``; no reference."""
    per_token = _per_token(token_logps, lengths, advantages)
    return awr(token_logps, per_token, lam=lam, max_weight=max_weight)


def _like(advantages: Tensor, token_logps: Tensor) -> Tensor:
    """Detached, in the dtype of the log-probs: half precision would round what is made of them."""
    return advantages.detach().to(token_logps.dtype)


def _per_token(token_logps: Tensor, lengths: Tensor, advantages: Tensor | None) -> Tensor:
    if advantages is None:
        advantages = torch.ones_like(lengths, dtype=token_logps.dtype)
        advantages[1::2] = -1
    elif advantages.shape != lengths.shape:
        raise ValueError(
            f"expected one advantage a sequence, {tuple(lengths.shape)}, "
            f"got {tuple(advantages.shape)}"
        )
    # With output_size the device need not be waited for.
    return advantages.repeat_interleave(lengths, output_size=token_logps.numel())
