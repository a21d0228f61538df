"""What on-policy APA does on bandits, whose fixed points are known (records: ``oracles``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdaa.losses import apa
from fastdaa.study.oracle_records import bandit, record, vector_record


def apa_bandit(lam: float = 0.5) -> list[dict[str, Any]]:
    """On-policy APA on contextual bandits ends at ``ref e^(A / lam) / Z``, loss ``E[(log Z)^2]``.

    The loss function leaves Z out (arXiv 2306.02231, eq. 6), yet weights of the policy itself make
    ``log pi - log ref - A / lam`` the same for all actions: minus log Z, whose square is the loss
    that remains.
    """
    states = [bandit(seed) for seed in range(4)]
    targets, found, floors, losses = [], [], [], []
    for ref_logps, rewards in states:
        logits = ref_logps + rewards / lam
        targets.append(torch.log_softmax(logits, 0).exp())
        floors.append(torch.logsumexp(logits, 0).item() ** 2)
        policy = _iterate_apa(ref_logps, partial(_unchanged, rewards), lam)
        found.append(policy.exp())
        losses.append(float((policy.exp() * apa(policy, ref_logps, rewards, lam=lam)).sum()))
    return [
        vector_record(
            "apa_fixed_point",
            f"APA's fixed point is ref e^(A/lam) / Z at lam = {lam:g} (4 states)",
            torch.cat(targets),
            torch.cat(found),
            1e-3,
        ),
        record(
            "apa_loss_floor",
            "APA's loss ends at E[(log Z)^2], not at 0",
            sum(floors) / len(floors),
            sum(losses) / len(losses),
            1e-3,
        ),
    ]


def apa_whitened(lam: float = 0.5) -> list[dict[str, Any]]:
    """Advantages divided by their spread under the policy: the anchor gives way.

    The spread shrinks as the policy concentrates, so the effective lambda shrinks with it, and the
    policy ends at one action.
    """
    ref_logps, rewards = bandit()

    def whitened(logps: Tensor) -> Tensor:
        weights = logps.exp()
        centred = rewards - weights @ rewards
        return centred / torch.sqrt(weights @ centred.square() + 1e-8)

    target = torch.log_softmax(ref_logps + rewards / lam, 0).exp()
    plain = _iterate_apa(ref_logps, partial(_unchanged, rewards), lam).exp()
    collapsed = _iterate_apa(ref_logps, whitened, lam).exp()
    return [
        record(
            "apa_whitened_collapses",
            f"whitened APA at lam = {lam:g} ends at one action (largest probability 1)",
            1.0,
            float(collapsed.max()),
            1e-3,
        ),
        record(
            "apa_plain_does_not",
            f"unwhitened APA has the largest probability of ref e^(A/lam) / Z, lam = {lam:g}",
            float(target.max()),
            float(plain.max()),
            1e-3,
        ),
    ]


def _unchanged(advantages: Tensor, logps: Tensor) -> Tensor:
    return advantages


def _iterate_apa(
    ref_logps: Tensor, advantages: Callable[[Tensor], Tensor], lam: float, steps: int = 2000
) -> Tensor:
    """Log-probs after exact on-policy APA steps: every action weighted by the policy itself.

    A natural-gradient step keeps rare actions moving as fast as frequent ones.
    """
    logits = ref_logps.clone()
    for _ in range(steps):
        logits.requires_grad_()
        logps = torch.log_softmax(logits, 0)
        weights = logps.detach().exp()
        losses = apa(logps, ref_logps, advantages(logps.detach()), lam=lam)
        (gradient,) = torch.autograd.grad((weights * losses).sum(), logits)
        step = 0.05 * gradient / weights.clamp(min=1e-12)
        if float(step.abs().max()) < 1e-13:
            break
        logits = torch.log_softmax(logits.detach() - step, 0)
    return torch.log_softmax(logits.detach(), 0)
