"""Policies in closed form: exponential tilting and best-of-n of a reward, exactly.

From a reward of every response follow, without training or sampling,

- ``pi(y|x) = ref(y|x) exp(proxy(x, y) / b) / Z(x)``, the optimum of reinforcement learning with a
  KL penalty of weight b;
- the distribution of the best of n responses of the reference, ties drawn at random.

The reward that they follow is called the proxy, for it need not be the gold reward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tilt(ref_logps: Tensor, proxy: Tensor, temperature: float) -> Tensor:
    """Log-probs of ``ref exp(proxy / temperature) / Z``, ``[P, R]``.

    Args:
        ref_logps, proxy: ``[P, R]`` fp64.
        temperature: the weight b of the KL penalty, in units of the proxy.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    return (ref_logps + proxy / temperature).log_softmax(dim=1)


def best_of_n(ref_logps: Tensor, proxy: Tensor, n: int) -> Tensor:
    """Log-probs of the response with the highest proxy reward among n of the reference, ``[P, R]``.

    With F the reference's probability of a reward of at most that of y, F' of less, and m = F - F'
    the mass of the responses that tie with y: ``pi(y) = ref(y) / m (F^n - F'^n)``. It is computed
    in logarithms, from the mass above y, so that neither large n nor rare responses lose digits.

    Raises:
        ValueError: ``n`` below 1.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    return torch.stack([_best_of_n(*row, n) for row in zip(ref_logps, proxy, strict=True)])


def _best_of_n(ref_logps: Tensor, proxy: Tensor, n: int) -> Tensor:
    _, group = torch.unique(proxy, return_inverse=True)
    probs = ref_logps.softmax(0)
    mass = probs.new_zeros(int(group.max()) + 1).index_add_(0, group, probs)
    above = mass.flip(0).cumsum(0).flip(0) - mass
    below = mass.cumsum(0) - mass
    # log F from the side on which fewer digits are lost.
    log_upto = torch.where(above < 0.5, torch.log1p(-above), torch.log(mass + below))
    share = mass / (mass + below)
    share[0] = 1.0
    log_best = n * log_upto + torch.log(-torch.expm1(n * torch.log1p(-share)))
    return (ref_logps + (log_best - mass.log())[group]).log_softmax(0)


def best_of_n_kl(n: int) -> float:
    """``log n - (n - 1) / n``: the KL of best-of-n in nats if no two responses tie."""
    return math.log(n) - (n - 1) / n


def standardised(proxy: Tensor, ref_logps: Tensor) -> Tensor:
    """The proxy with mean 0 for each prompt, and unit pooled deviation, under the reference."""
    probs = ref_logps.softmax(1)
    centred = proxy - (probs * proxy).sum(1, keepdim=True)
    return centred / (probs * centred.square()).sum(1).mean().sqrt()


def correlation(first: Tensor, second: Tensor, ref_logps: Tensor) -> float:
    """Correlation of two rewards within prompts under the reference, -1 to 1."""
    a, b = standardised(first, ref_logps), standardised(second, ref_logps)
    return float((ref_logps.softmax(1) * a * b).sum(1).mean())
