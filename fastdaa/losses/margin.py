"""Losses of the margin alone: how much more the policy prefers the chosen completion.

With the log-ratios ``a = log policy(chosen) - log ref(chosen)`` and ``b`` the same for the
rejected completion, the margin is ``h = a - b``. Everything here is a function of ``beta * h``.
The margin is built from the two log-ratios, so that equal policy and reference give exactly 0.

Every function returns the losses ``[B]``, unreduced, in the dtype of the log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdaa.losses.elementary import LARGEST, expm1, sigmoid
from fastdaa.outputs import PairLogps

EXPONENT_LIMIT = 30.0
"""Below ``x = -EXPONENT_LIMIT``, ``exp(-x)`` continues as its tangent: finite and never flat."""

SATURATION = 1000.0
"""``sigmoid(-x)`` is 0 beyond it, in fp64 too."""

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""Divergences of :func:`f_dpo`, by TRL's names."""


def logratios(policy: PairLogps, ref: PairLogps) -> tuple[Tensor, Tensor]:
    """Log-ratios ``[B]`` of the chosen and of the rejected completions, in nats."""
    return policy.chosen - ref.chosen, policy.rejected - ref.rejected


def margin(policy: PairLogps, ref: PairLogps, *, length_norm: bool = False) -> Tensor:
    """Log-ratio difference ``h`` ``[B]``; of per-token means with ``length_norm``.

    The mean divides by ``max(length, 1)``: an empty completion contributes 0.
    """
    chosen, rejected = logratios(policy, ref)
    if length_norm:
        chosen = chosen / policy.chosen_lengths.clamp(min=1)
        rejected = rejected / policy.rejected_lengths.clamp(min=1)
    return chosen - rejected


def smoothed_logistic(x: Tensor, label_smoothing: float) -> Tensor:
    """``-(1 - eps) log sigmoid(x) - eps log sigmoid(-x)``."""
    if label_smoothing == 0:
        return -F.logsigmoid(x)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def dpo(
    policy: PairLogps,
    ref: PairLogps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_alpha: float = 0.0,
    length_norm: bool = False,
) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): ``-log sigmoid(beta h)``.

    ``label_smoothing`` is the conservative DPO of Mitchell (2023): the probability that a label is
    flipped. ``length_alpha`` is R-DPO (arXiv 2403.19159): it adds
    ``length_alpha * (chosen_length - rejected_length)`` inside the sigmoid, not multiplied by
    beta; positive values shorten the policy's answers. ``length_norm`` uses per-token means of the
    log-ratios (Tulu 3, arXiv 2411.15124), with which beta has to be many times larger.
    """
    x = beta * margin(policy, ref, length_norm=length_norm)
    if length_alpha != 0:
        longer = (policy.chosen_lengths - policy.rejected_lengths).to(x.dtype)
        x = x + length_alpha * longer
    return smoothed_logistic(x, label_smoothing)


def f_dpo(
    policy: PairLogps,
    ref: PairLogps,
    *,
    beta: float = 0.1,
    f_divergence_type: str = "js_divergence",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """f-DPO (arXiv 2309.16240, eq. 9): DPO under another divergence from the reference than KL.

    ``-log sigmoid(beta (f'(u_w) - f'(u_l)))`` with the ratios ``u = policy / ref`` of the two
    completions. ``f'(u)`` is ``log u`` for ``"reverse_kl"``, which is DPO, ``1 - 1/u`` for
    ``"forward_kl"``, ``log(2 u / (1 + u))`` for ``"js_divergence"``, and
    ``(u^(alpha - 1) - 1) / (alpha - 1)`` for ``"alpha_divergence"`` with ``alpha`` of
    ``f_alpha_divergence_coef``: forward KL at 0, reverse KL at 1. TRL's names and derivatives;
    powers ``u^p`` above ``exp(EXPONENT_LIMIT)`` continue as their tangent in ``log u``.
    """
    if f_divergence_type not in F_DIVERGENCES:
        raise ValueError(
            f"expected f_divergence_type in {list(F_DIVERGENCES)}, got {f_divergence_type!r}"
        )
    chosen, rejected = logratios(policy, ref)
    alpha = divergence_alpha(f_divergence_type, f_alpha_divergence_coef)
    if alpha is None:
        x = F.logsigmoid(chosen) - F.logsigmoid(rejected)
    elif alpha == 1:
        x = chosen - rejected
    else:
        powers = [_power_less_one((alpha - 1) * ratio) for ratio in (chosen, rejected)]
        x = (powers[0] - powers[1]) / (alpha - 1)
    return -F.logsigmoid(beta * x)


def divergence_alpha(f_divergence_type: str, f_alpha_divergence_coef: float) -> float | None:
    """The alpha that a divergence is in the family of alpha divergences; None outside it.

    Within 1e-6 of 1 it is 1, as with TRL.
    """
    if f_divergence_type == "alpha_divergence":
        near = abs(f_alpha_divergence_coef - 1) < 1e-6
        return 1.0 if near else f_alpha_divergence_coef
    return {"reverse_kl": 1.0, "forward_kl": 0.0}.get(f_divergence_type)


def robust(
    policy: PairLogps, ref: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Tensor:
    """Robust DPO (arXiv 2403.00409): unbiased when labels are flipped with ``label_smoothing``.

    ``(-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)) / (1 - 2 eps)``; not bounded
    below, since the second term falls without limit as h grows.
    """
    x = beta * margin(policy, ref)
    if label_smoothing == 0:
        return -F.logsigmoid(x)
    clean = (1 - label_smoothing) * F.logsigmoid(x)
    flipped = label_smoothing * F.logsigmoid(-x)
    return (flipped - clean) / (1 - 2 * label_smoothing)


def ipo(
    policy: PairLogps,
    ref: PairLogps,
    *,
    beta: float = 0.1,
    target: str = "standard",
    length_norm: bool = False,
) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17; its tau is beta): a squared distance to a finite margin.

    ``target="standard"`` is ``(h - 1 / (2 beta))^2``; ``target="unified"`` is ``(beta h - 1)^2``
    (arXiv 2406.02900), whose margin is ``1 / beta``, twice the standard one. TRL's ``ipo`` is the
    standard target with ``length_norm=True``.
    """
    h = margin(policy, ref, length_norm=length_norm)
    if target == "standard":
        return (h - 1 / (2 * beta)).square()
    if target == "unified":
        return _squared(beta * h)
    raise ValueError(f"expected target 'standard' or 'unified', got {target!r}")


def slic(policy: PairLogps, ref: PairLogps, *, beta: float = 0.1, delta: float = 1.0) -> Tensor:
    """Reference-normalised hinge ``max(0, delta - beta h)`` (RSO's hinge-norm, arXiv 2309.06657).

    The gradient is exactly 0 at the kink and beyond it. ``slic_hf`` is the original without a
    reference.
    """
    return torch.relu(delta - beta * margin(policy, ref))


def truncated_quadratic(policy: PairLogps, ref: PairLogps, *, beta: float = 0.1) -> Tensor:
    """GPO's truncated quadratic ``max(0, 1 - beta h)^2`` (arXiv 2402.05749)."""
    return _truncated_quadratic(beta * margin(policy, ref))


def exponential(policy: PairLogps, ref: PairLogps, *, beta: float = 0.1) -> Tensor:
    """GPO's exponential ``exp(-beta h)`` (arXiv 2402.05749).

    Below ``beta h = -EXPONENT_LIMIT`` it continues as its tangent, so that value and gradient stay
    finite and badly ranked pairs keep their pull.
    """
    return _exponential(beta * margin(policy, ref))


def savage(policy: PairLogps, ref: PairLogps, *, beta: float = 0.1) -> Tensor:
    """GPO's Savage loss ``(1 + exp(beta h))^-2`` (arXiv 2402.05749); bounded, not convex."""
    return _savage(beta * margin(policy, ref))


def exo_pair(
    policy: PairLogps, ref: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3
) -> Tensor:
    """EXO for pairs (arXiv 2402.00856, eq. 16): KL of ``softmax(beta h)`` to ``(1 - eps, eps)``.

    ``label_smoothing`` must be positive: the divergence is infinite at 0.
    """
    # What a probability of 0 is multiplied by must not be infinite.
    x = (beta * margin(policy, ref)).clamp(-SATURATION, SATURATION)
    chosen = sigmoid(x) * (F.logsigmoid(x) - math.log1p(-label_smoothing))
    rejected = sigmoid(-x) * (F.logsigmoid(-x) - math.log(label_smoothing))
    return chosen + rejected


def discopop(
    policy: PairLogps, ref: PairLogps, *, beta: float = 0.1, discopop_tau: float = 0.05
) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (arXiv 2406.08414, eq. 5).

    ``(1 - m) * -log sigmoid(beta h) + m * exp(-beta h)`` with ``m = sigmoid(beta h / tau)``.
    The second product is formed in the exponent, where it cannot overflow for ``tau <= 1``.
    """
    x = beta * margin(policy, ref)
    scaled, bounded = x / discopop_tau, x.clamp(min=-LARGEST)
    # log m - x; for x < 0 without the difference of x / tau and x, which are close or infinite.
    below = (1 / discopop_tau - 1) * bounded + F.logsigmoid(-scaled)
    exponent = torch.where(x < 0, below, F.logsigmoid(scaled) - x)
    return sigmoid(scaled) * F.logsigmoid(bounded) - F.logsigmoid(x) + exponent.exp()


class MarginFunction(NamedTuple):
    """A scalar function ``g`` and its derivative, both elementwise on ``[B]`` tensors."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def daa(
    policy: PairLogps,
    ref: PairLogps,
    *,
    beta: float = 0.1,
    g: str | MarginFunction | tuple[Callable, Callable] = "logistic",
) -> Tensor:
    """The unified direct alignment family ``g(beta h)`` (arXiv 2406.02900 and 2402.05749).

    ``g`` is a name in ``MARGIN_FUNCTIONS`` or a pair ``(value, derivative)`` of callables; convex
    functions make convex problems in h. ``"logistic"`` is dpo, ``"squared"`` ipo with the unified
    target, ``"hinge"`` slic.
    """
    if isinstance(g, str):
        if g not in MARGIN_FUNCTIONS:
            raise ValueError(f"expected g in {sorted(MARGIN_FUNCTIONS)} or a pair, got {g!r}")
        g = MARGIN_FUNCTIONS[g]
    value, derivative = g
    return _GivenDerivative.apply(beta * margin(policy, ref), value, derivative)


class _GivenDerivative(torch.autograd.Function):
    """Apply a function whose derivative is given rather than traced."""

    @staticmethod
    def forward(x: Tensor, value: Callable, derivative: Callable) -> Tensor:
        return value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, _, ctx.derivative = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grad * ctx.derivative(x), None, None


def _squared(x: Tensor) -> Tensor:
    return (x - 1).square()


def _truncated_quadratic(x: Tensor) -> Tensor:
    return torch.relu(1 - x).square()


def _power_less_one(x: Tensor) -> Tensor:
    # Near alpha = 1 both powers are nearly 1, which would swallow their difference.
    exponent = x.clamp(max=EXPONENT_LIMIT)
    return expm1(exponent) + exponent.exp() * torch.relu(x - EXPONENT_LIMIT)


def _exponential(x: Tensor) -> Tensor:
    # The excess is 0, and not infinity minus itself, where the margin is infinite.
    exponent = (-x).clamp(max=EXPONENT_LIMIT)
    return exponent.exp() * (1 + torch.relu(-x - EXPONENT_LIMIT))


def _savage(x: Tensor) -> Tensor:
    return sigmoid(-x).square()


MARGIN_FUNCTIONS: dict[str, MarginFunction] = {
    "logistic": MarginFunction(lambda x: -F.logsigmoid(x), lambda x: -torch.sigmoid(-x)),
    "squared": MarginFunction(_squared, lambda x: 2 * (x - 1)),
    "hinge": MarginFunction(lambda x: torch.relu(1 - x), lambda x: -(x < 1).to(x.dtype)),
    "truncated_quadratic": MarginFunction(_truncated_quadratic, lambda x: -2 * torch.relu(1 - x)),
    "exponential": MarginFunction(_exponential, lambda x: -(-x).clamp(max=EXPONENT_LIMIT).exp()),
    "savage": MarginFunction(_savage, lambda x: -2 * torch.sigmoid(-x).square() * torch.sigmoid(x)),
}
"""Members of the family by name; ``savage`` is the one that is not convex."""
