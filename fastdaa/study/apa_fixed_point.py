"""Where on-policy APA ends in a world, exactly: one walk over the tree of prefixes, leaves first.

With an exact critic the loss of APA is stationary where, in every state, the policy is
``pi(a|s) = ref(a|s) exp(Q(s, a) / lambda) / Z(s)`` and Q the expected reward under that same
policy. The reward comes at the end and nothing is discounted, so Q of a prefix follows from what
comes after it. This is not ``ref(y) exp(r(y) / lambda) / Z``, the optimum of a reward with a KL
penalty: Q carries no cost of the KL to come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.study.language import Language


def apa_fixed_point(
    language: Language, ref_logps: Tensor, rewards: Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    """Log-probs of all responses at the fixed point, and the loss that remains there.

    Args:
        ref_logps: ``[P, R]`` fp64 log-probs of the reference.
        rewards: ``[P, R]`` fp64.
        lam: lambda of APA.

    Returns:
        ``[P, R]`` log-probs, and ``[P]`` the sums of ``(log Z)^2`` over the tokens of a response,
        expected under the policy: the loss of a response that is left over.

    Raises:
        ValueError: ``lam`` is not above 0.
    """
    if not lam > 0:
        raise ValueError(f"lam: expected a number above 0, got {lam}")
    levels = language.longest
    ended = [slice(*language.starts[level : level + 2]) for level in range(levels + 1)]
    # At the last level a prefix is a whole response.
    ref_mass, value = ref_logps[:, ended[levels]], rewards[:, ended[levels]]
    floor = torch.zeros_like(value)
    steps: list[Tensor] = []
    for level in range(levels - 1, -1, -1):
        # Of every prefix: its continuations by each token, then its end.
        below = (t.unflatten(1, (-1, language.tokens)) for t in (ref_mass, value, floor))
        here = (ref_logps[:, ended[level]], rewards[:, ended[level]])
        mass, q, rest = below
        mass = torch.cat([mass, here[0][..., None]], dim=-1)
        q = torch.cat([q, here[1][..., None]], dim=-1)
        rest = torch.cat([rest, torch.zeros_like(here[1])[..., None]], dim=-1)
        ref_mass = mass.logsumexp(-1)
        tilted = mass - ref_mass[..., None] + q / lam
        log_z = tilted.logsumexp(-1)
        step = tilted - log_z[..., None]
        probs = step.exp()
        value = (probs * q).sum(-1)
        floor = (probs * rest).sum(-1) + log_z.square()
        steps.append(step)
    return _along_the_tree(language, steps[::-1]), floor[:, 0]


def _along_the_tree(language: Language, steps: list[Tensor]) -> Tensor:
    """Log-probs of responses from those of single steps, ``[P, prefixes, T + 1]`` by level."""
    prefix = steps[0].new_zeros(len(steps[0]), 1)
    ended = []
    for step in steps:
        ended.append(prefix + step[..., language.tokens])
        prefix = (prefix[..., None] + step[..., : language.tokens]).flatten(1)
    return torch.cat([*ended, prefix], dim=1)
