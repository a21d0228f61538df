"""The objectives as jitted functions with their derivatives, to be handed to the objective kernel.

A pair objective maps what is known of one pair to its loss and the loss's derivatives by the two
sequence log-probabilities:

    fn(a, b, chosen_length, rejected_length, p0, p1, p2, likelihood, NORM) -> (loss, da, db)

``a`` and ``b`` are the chosen and the rejected log-ratio, or log-probability where the objective
has no reference. ``p0, p1, p2`` are its hyperparameters in the order that ``PAIR_OBJECTIVES``
gives, ``likelihood`` is pairs over chosen tokens of the batch, ``NORM`` asks for per-token means.
Everything is a scalar in fp64: there is one evaluation a pair, so its cost does not matter, and a
result is then right to the fp32 rounding.
``fastdaa/losses`` is the specification and has the papers; a test compares the two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastdaa.kernels.elementary import expm1, log1p

EXPONENT_LIMIT = tl.constexpr(30.0)
LARGEST_MEAN_LOGP = tl.constexpr(-1.0e-6)
SATURATION = tl.constexpr(1000.0)
LARGEST = tl.constexpr(1.0e30)


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _bounded(x, low, high):
    """``x`` within bounds; a NaN stays NaN."""
    above = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smoothed_logistic(x, eps):
    """``-(1 - eps) log sigmoid(x) - eps log sigmoid(-x)`` and its derivative."""
    flipped = tl.where(eps == 0.0, 0.0, eps * _log_sigmoid(-x))  # 0 where x is infinite, too
    value = -(1.0 - eps) * _log_sigmoid(x) - flipped
    return value, eps * _sigmoid(x) - (1.0 - eps) * _sigmoid(-x)


@triton.jit
def _divisors(chosen_length, rejected_length, NORM: tl.constexpr):
    """What log-ratios are divided by: lengths of at least 1 if ``NORM``, else 1."""
    if NORM:
        chosen_length = tl.maximum(chosen_length, 1.0)
        rejected_length = tl.maximum(rejected_length, 1.0)
    else:
        chosen_length = chosen_length * 0.0 + 1.0
        rejected_length = rejected_length * 0.0 + 1.0
    return chosen_length, rejected_length


@triton.jit
def dpo(a, b, chosen_length, rejected_length, beta, eps, alpha, likelihood, NORM: tl.constexpr):
    """DPO with label smoothing, R-DPO's length term and length normalisation."""
    over_a, over_b = _divisors(chosen_length, rejected_length, NORM)
    x = beta * (a / over_a - b / over_b) + alpha * (chosen_length - rejected_length)
    value, slope = _smoothed_logistic(x, eps)
    return value, slope * beta / over_a, -slope * beta / over_b


@triton.jit
def f_dpo_js(a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr):
    """f-DPO with the Jensen-Shannon divergence."""
    x = beta * (_log_sigmoid(a) - _log_sigmoid(b))
    slope = -beta * _sigmoid(-x)
    return -_log_sigmoid(x), slope * _sigmoid(-a), -slope * _sigmoid(-b)


@triton.jit
def _power(logratio, p):
    """``exp(p * logratio) - 1``, continued as its tangent above ``exp(EXPONENT_LIMIT)``, and its
    derivative over p."""
    x = p * logratio
    exponent = tl.minimum(x, EXPONENT_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp(exponent)
    below = expm1(-tl.abs(exponent))
    power = tl.where(exponent > 0.0, -e * below, below)
    return power + e * tl.maximum(x - EXPONENT_LIMIT, 0.0), e


@triton.jit
def f_dpo_alpha(
    a, b, chosen_length, rejected_length, beta, exponent, p2, likelihood, NORM: tl.constexpr
):
    """f-DPO with an alpha divergence; the exponent is ``alpha - 1``, not 0, and -1 the forward KL.

    In fp32 an alpha near 1 would lose the digits of the exponent.
    """
    power_a, slope_a = _power(a, exponent)
    power_b, slope_b = _power(b, exponent)
    x = beta * (power_a - power_b) / exponent
    slope = -beta * _sigmoid(-x)
    return -_log_sigmoid(x), slope * slope_a, -slope * slope_b


@triton.jit
def robust(a, b, chosen_length, rejected_length, beta, eps, p2, likelihood, NORM: tl.constexpr):
    x = beta * (a - b)
    norm = 1.0 / (1.0 - 2.0 * eps)
    flipped = tl.where(eps == 0.0, 0.0, eps * _log_sigmoid(-x))  # 0 where x is infinite, too
    value = norm * (flipped - (1.0 - eps) * _log_sigmoid(x))
    slope = -norm * beta * (eps * _sigmoid(x) + (1.0 - eps) * _sigmoid(-x))
    return value, slope, -slope


@triton.jit
def ipo(a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr):
    """IPO with the standard target ``1 / (2 beta)``."""
    over_a, over_b = _divisors(chosen_length, rejected_length, NORM)
    gap = a / over_a - b / over_b - 0.5 / beta
    return gap * gap, 2.0 * gap / over_a, -2.0 * gap / over_b


@triton.jit
def ipo_unified(a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr):
    """IPO with the unified target ``1 / beta``."""
    over_a, over_b = _divisors(chosen_length, rejected_length, NORM)
    gap = beta * (a / over_a - b / over_b) - 1.0
    return gap * gap, 2.0 * beta * gap / over_a, -2.0 * beta * gap / over_b


@triton.jit
def slic(a, b, chosen_length, rejected_length, beta, delta, p2, likelihood, NORM: tl.constexpr):
    """Hinge; its derivative is exactly 0 at the kink and beyond it."""
    gap = delta - beta * (a - b)
    slope = tl.where(gap > 0, -beta, 0.0)
    return tl.maximum(gap, 0.0, propagate_nan=tl.PropagateNan.ALL), slope, -slope


@triton.jit
def slic_hf(
    a, b, chosen_length, rejected_length, delta, regularization, p2, likelihood,
    NORM: tl.constexpr,
):  # fmt: skip
    gap = delta - (a - b)
    slope = tl.where(gap > 0, -1.0, 0.0)
    hinge = tl.maximum(gap, 0.0, propagate_nan=tl.PropagateNan.ALL)
    likely = tl.where(regularization == 0.0, 0.0, regularization * a)
    return hinge - likely, slope - regularization, -slope


@triton.jit
def truncated_quadratic(
    a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr
):
    gap = tl.maximum(1.0 - beta * (a - b), 0.0, propagate_nan=tl.PropagateNan.ALL)
    slope = -2.0 * beta * gap
    return gap * gap, slope, -slope


@triton.jit
def exponential(a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr):
    """``exp(-x)``, continued as its tangent below ``x = -EXPONENT_LIMIT``."""
    x = beta * (a - b)
    exponent = tl.minimum(-x, EXPONENT_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp(exponent)
    return e * (1.0 + tl.maximum(-x - EXPONENT_LIMIT, 0.0)), -beta * e, beta * e


@triton.jit
def savage(a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr):
    x = beta * (a - b)
    wrong = _sigmoid(-x)
    slope = -2.0 * beta * wrong * wrong * _sigmoid(x)
    return wrong * wrong, slope, -slope


@triton.jit
def exo_pair(a, b, chosen_length, rejected_length, beta, eps, p2, likelihood, NORM: tl.constexpr):
    x = _bounded(beta * (a - b), -SATURATION, SATURATION)
    right, wrong = _sigmoid(x), _sigmoid(-x)
    log_odds = tl.log(1.0 - eps) - tl.log(eps)
    value = right * (_log_sigmoid(x) - tl.log(1.0 - eps)) + wrong * (_log_sigmoid(-x) - tl.log(eps))
    slope = beta * right * wrong * (x - log_odds)
    return value, slope, -slope


@triton.jit
def discopop(a, b, chosen_length, rejected_length, beta, tau, p2, likelihood, NORM: tl.constexpr):
    x = beta * (a - b)
    bounded = _bounded(x, -LARGEST, LARGEST)
    modulation = _sigmoid(-x / tau)
    blend = modulation * _sigmoid(x / tau) / tau
    below = (1.0 / tau - 1.0) * bounded + _log_sigmoid(-x / tau)
    tail = tl.exp(tl.where(x < 0, below, _log_sigmoid(x / tau) - x))
    slope = blend * _log_sigmoid(bounded) - modulation * _sigmoid(-x)
    slope += tail * (modulation / tau - 1.0)
    value = _sigmoid(x / tau) * _log_sigmoid(bounded) - _log_sigmoid(x) + tail
    return value, beta * slope, -beta * slope


@triton.jit
def simpo(a, b, chosen_length, rejected_length, beta, gamma, eps, likelihood, NORM: tl.constexpr):
    over_a, over_b = _divisors(chosen_length, rejected_length, True)
    value, slope = _smoothed_logistic(beta * (a / over_a - b / over_b) - gamma, eps)
    return value, slope * beta / over_a, -slope * beta / over_b


@triton.jit
def _log_odds(mean_logp):
    """``m - log(1 - exp(m))``, m capped, and its derivative."""
    m = tl.minimum(mean_logp, LARGEST_MEAN_LOGP, propagate_nan=tl.PropagateNan.ALL)
    chance = -expm1(m)
    return m - tl.log(chance), tl.where(mean_logp <= LARGEST_MEAN_LOGP, 1.0 / chance, 0.0)


@triton.jit
def orpo(a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr):
    over_a, over_b = _divisors(chosen_length, rejected_length, True)
    odds_a, slope_a = _log_odds(a / over_a)
    odds_b, slope_b = _log_odds(b / over_b)
    pull = beta * _sigmoid(odds_b - odds_a)
    value = -likelihood * a - beta * _log_sigmoid(odds_a - odds_b)
    return value, -likelihood - pull * slope_a / over_a, pull * slope_b / over_b


@triton.jit
def cpo(
    a, b, chosen_length, rejected_length, beta, eps, nll_weight, likelihood,
    NORM: tl.constexpr,
):  # fmt: skip
    value, slope = _smoothed_logistic(beta * (a - b), eps)
    pull = nll_weight * likelihood
    likely = tl.where(nll_weight == 0.0, 0.0, pull * a)
    return value - likely, slope * beta - pull, -slope * beta


@triton.jit
def sft(a, b, chosen_length, rejected_length, p0, p1, p2, likelihood, NORM: tl.constexpr):
    return -likelihood * a, -likelihood, 0.0 * likelihood


@triton.jit
def apo_zero(a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr):
    low, high = _sigmoid(-beta * a), _sigmoid(beta * b)
    return low + high, -beta * low * _sigmoid(beta * a), beta * high * _sigmoid(-beta * b)


@triton.jit
def apo_down(a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr):
    high, wrong = _sigmoid(beta * a), _sigmoid(-beta * (a - b))
    slope = beta * wrong * _sigmoid(beta * (a - b))
    return high + wrong, beta * high * _sigmoid(-beta * a) - slope, slope


@triton.jit
def nca_pair(a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr):
    noise = _log_sigmoid(-beta * a) + _log_sigmoid(-beta * b)
    slope = beta * (0.5 * _sigmoid(beta * a) - _sigmoid(-beta * a))
    return -_log_sigmoid(beta * a) - 0.5 * noise, slope, 0.5 * beta * _sigmoid(beta * b)


@triton.jit
def bco_pair(a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr):
    value = -_log_sigmoid(beta * a) - _log_sigmoid(-beta * b)
    return value, -beta * _sigmoid(-beta * a), beta * _sigmoid(beta * b)


@triton.jit
def sppo_hard(a, b, chosen_length, rejected_length, beta, p1, p2, likelihood, NORM: tl.constexpr):
    up, down = a - 0.5 / beta, b + 0.5 / beta
    return up * up + down * down, 2.0 * up, 2.0 * down


@triton.jit
def apa(logp, ref_logp, advantage, lam, p1):
    """Token objective: ``fn(logp, ref_logp, advantage, p0, p1) -> (loss, dlogp)``, elementwise."""
    gap = logp - ref_logp - advantage / lam
    return gap * gap, 2.0 * gap


@triton.jit
def awr(logp, ref_logp, advantage, lam, log_max_weight):
    """Token objective; the largest weight is given as its log."""
    exponent = advantage / lam
    weight = tl.exp(tl.minimum(exponent, log_max_weight, propagate_nan=tl.PropagateNan.ALL))
    return -weight * logp, -weight


class PairObjective(NamedTuple):
    """A jitted objective, and what its launcher has to hand over."""

    fn: Any
    parameters: tuple[str, ...] = ("beta",)
    """Hyperparameters that become ``p0, p1, p2``, or what ``objective_kernel`` makes of them."""
    needs_ref: bool = True
    needs_totals: bool = False
    """Reads ``likelihood``."""
    takes_length_norm: bool = False


PAIR_OBJECTIVES: dict[str, PairObjective] = {
    "dpo": PairObjective(dpo, ("beta", "label_smoothing", "length_alpha"), takes_length_norm=True),
    "f_dpo_js": PairObjective(f_dpo_js),
    "f_dpo_alpha": PairObjective(f_dpo_alpha, ("beta", "exponent")),
    "robust": PairObjective(robust, ("beta", "label_smoothing")),
    "ipo": PairObjective(ipo, takes_length_norm=True),
    "ipo_unified": PairObjective(ipo_unified, takes_length_norm=True),
    "slic": PairObjective(slic, ("beta", "delta")),
    "slic_hf": PairObjective(slic_hf, ("delta", "regularization"), needs_ref=False),
    "truncated_quadratic": PairObjective(truncated_quadratic),
    "exponential": PairObjective(exponential),
    "savage": PairObjective(savage),
    "exo_pair": PairObjective(exo_pair, ("beta", "label_smoothing")),
    "discopop": PairObjective(discopop, ("beta", "discopop_tau")),
    "simpo": PairObjective(simpo, ("beta", "gamma", "label_smoothing"), needs_ref=False),
    "orpo": PairObjective(orpo, needs_ref=False, needs_totals=True),
    "cpo": PairObjective(
        cpo, ("beta", "label_smoothing", "nll_weight"), needs_ref=False, needs_totals=True
    ),
    "sft": PairObjective(sft, (), needs_ref=False, needs_totals=True),
    "apo_zero": PairObjective(apo_zero),
    "apo_down": PairObjective(apo_down),
    "nca_pair": PairObjective(nca_pair),
    "bco_pair": PairObjective(bco_pair),
    "sppo_hard": PairObjective(sppo_hard),
}
"""Every objective of ``fastdaa.losses.LOSSES`` that reads one pair at a time, by the same name; the
two targets of ``ipo`` are two functions, as are the divergences of ``f_dpo`` that are not ``dpo``.
The losses that couple a batch are not here."""

TOKEN_OBJECTIVES: dict[str, tuple[Any, tuple[str, ...], bool]] = {
    "apa_pairs": (apa, ("lam",), True),
    "awr_pairs": (awr, ("lam", "log_max_weight"), False),
}
"""Token objectives: the function, its ``p0, p1``, whether it needs reference log-probs."""
