"""Tabular problems whose solutions are known in closed form, solved with the project's losses.

Every check returns records ``{"name", "claim", "expected", "got", "error", "tolerance", "holds"}``:
numbers, and ``holds`` says whether ``error <= tolerance``. Where vectors are compared, ``expected``
and ``got`` are their largest entries and ``error`` is the largest difference of any entry. A claim
that something does *not* happen has a null ``tolerance`` and tells its bound in the claim.

The minimisers and fixed points are derived in fp64; sources stand at each function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.losses import get_loss
from fastdaa.outputs import PairLogps
from fastdaa.study.apa_oracles import apa_bandit, apa_whitened
from fastdaa.study.oracle_records import apart_record, bandit, record, vector_record

PREFERENCE = 0.8
BETA = 0.3
_SMOOTHING = 0.1


def run_oracles() -> list[dict[str, Any]]:
    """All records; about two seconds."""
    return [
        *margin_minimisers(),
        *dpo_population_optimum(),
        *ipo_single_pair(),
        *apa_bandit(),
        *apa_whitened(),
    ]


class Minimiser(NamedTuple):
    """A loss and the margin that minimises its expectation when the label has probability p."""

    loss: str
    hyperparameters: dict[str, Any]
    closed_form: Callable[[float, float], float]
    """Of p and beta."""
    label: str


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


MINIMISERS = (
    Minimiser("dpo", {}, lambda p, b: _logit(p) / b, "logit(p) / beta"),
    Minimiser("ipo", {}, lambda p, b: (2 * p - 1) / (2 * b), "(2p - 1) / (2 beta)"),
    Minimiser("ipo", {"target": "unified"}, lambda p, b: (2 * p - 1) / b, "(2p - 1) / beta"),
    Minimiser("slic", {}, lambda p, b: math.copysign(1 / b, 2 * p - 1), "sign(2p - 1) / beta"),
    Minimiser("truncated_quadratic", {}, lambda p, b: (2 * p - 1) / b, "(2p - 1) / beta"),
    Minimiser("exponential", {}, lambda p, b: _logit(p) / (2 * b), "logit(p) / (2 beta)"),
    Minimiser("savage", {}, lambda p, b: _logit(p) / b, "logit(p) / beta"),
    Minimiser(
        "dpo",
        {"label_smoothing": _SMOOTHING},
        lambda p, b: _logit(p * (1 - _SMOOTHING) + (1 - p) * _SMOOTHING) / b,
        "logit(p (1 - eps) + (1 - p) eps) / beta",
    ),
)
"""Minimisers ``h*(p)`` of ``p l(h) + (1 - p) l(-h)``, by setting the derivative to 0."""


def margin_minimisers(p: float = PREFERENCE, beta: float = BETA) -> list[dict[str, Any]]:
    """``h*(p)`` of every loss that has one in closed form, found by bisecting the derivative."""
    records = []
    for entry in MINIMISERS:
        found = _root(partial(_slope, entry, p, beta), -40 / beta, 40 / beta)
        options = "".join(f", {key}={value}" for key, value in entry.hyperparameters.items())
        records.append(
            record(
                f"margin_{entry.loss}" + "".join(f"_{key}" for key in entry.hyperparameters),
                f"{entry.loss}{options}: h*(p) = {entry.label} at p = {p:g}, beta = {beta:g}",
                entry.closed_form(p, beta),
                found,
                1e-6,
            )
        )
    return records


def dpo_population_optimum(beta: float = 0.5) -> list[dict[str, Any]]:
    """DPO on all pairs with Bradley-Terry labels ends at ``ref e^(r / beta) / Z``.

    Rafailov et al., arXiv 2305.18290, eq. 4. The optimum of IPO with the same labels is another
    policy, which shows that the check can fail.
    """
    ref_logps, rewards = bandit()
    target = torch.log_softmax(ref_logps + rewards / beta, 0).exp()
    got = _best_policy("dpo", beta, ref_logps, rewards)
    other = _best_policy("ipo", beta, ref_logps, rewards)
    return [
        vector_record(
            "dpo_population_optimum",
            f"DPO's population optimum is ref e^(r/beta) / Z at beta = {beta:g}",
            target,
            got,
            1e-6,
        ),
        apart_record(
            "ipo_population_optimum",
            "IPO's population optimum is another policy (further than 0.01 in some entry)",
            target,
            other,
            0.01,
        ),
    ]


def ipo_single_pair(betas: tuple[float, ...] = (0.1, 0.5)) -> list[dict[str, Any]]:
    """Gradient descent on one pair: IPO stops at ``h = 1 / (2 beta)`` (arXiv 2310.12036, eq. 17).

    SLiC stops behind 1 / beta, at the first step whose gradient is 0.
    """
    records = []
    for beta in betas:
        margin = _descend_on_one_pair("ipo", beta, rate=0.05)
        records.append(
            record(
                f"ipo_single_pair_{beta:g}",
                f"IPO on one pair stops at h = 1 / (2 beta), beta = {beta:g}",
                1 / (2 * beta),
                margin,
                1e-6,
            )
        )
        rate = 0.05
        hinge = _descend_on_one_pair("slic", beta, rate=rate)
        # One step moves the margin by at most rate * beta * |gradient|^2 of the margin, 2.
        records.append(
            record(
                f"slic_single_pair_{beta:g}",
                f"SLiC on one pair stops at the first step behind 1 / beta, beta = {beta:g}",
                1 / beta,
                hinge,
                2.001 * rate * beta,
            )
        )
    return records


def _pair_logps(logps: Tensor, chosen: Tensor, rejected: Tensor) -> PairLogps:
    lengths = torch.ones_like(chosen)
    return PairLogps(logps[chosen], logps[rejected], lengths, lengths)


def _best_policy(loss: str, beta: float, ref_logps: Tensor, rewards: Tensor) -> Tensor:
    """Probabilities that minimise the expected loss over all ordered pairs."""
    chosen, rejected = torch.cartesian_prod(*(torch.arange(len(rewards)),) * 2).T
    weights = torch.sigmoid(rewards[chosen] - rewards[rejected])
    logits = ref_logps.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    reference = _pair_logps(ref_logps, chosen, rejected)

    def closure() -> Tensor:
        optimizer.zero_grad()
        policy = _pair_logps(torch.log_softmax(logits, 0), chosen, rejected)
        expected = (weights * get_loss(loss).fn(policy, reference, beta=beta)).mean()
        expected.backward()
        return expected

    optimizer.step(closure)
    return torch.softmax(logits.detach(), 0)


def _descend_on_one_pair(loss: str, beta: float, rate: float) -> float:
    """Margin at which plain gradient descent on free logits comes to rest."""
    ref_logps, _ = bandit()
    chosen, rejected = torch.tensor([0]), torch.tensor([1])
    reference = _pair_logps(ref_logps, chosen, rejected)
    logits = ref_logps.clone().requires_grad_()
    for _ in range(20_000):
        policy = _pair_logps(torch.log_softmax(logits, 0), chosen, rejected)
        (gradient,) = torch.autograd.grad(
            get_loss(loss).fn(policy, reference, beta=beta).sum(), logits
        )
        if float(gradient.abs().max()) < 1e-10:
            break
        with torch.no_grad():
            logits -= rate * gradient
    ratios = torch.log_softmax(logits.detach(), 0) - ref_logps
    return float(ratios[0] - ratios[1])


def _slope(entry: Minimiser, p: float, beta: float, h: float) -> float:
    """Derivative of the expected loss at the margin h."""
    margin = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    reference = PairLogps(zero, zero, one, one)
    loss = get_loss(entry.loss).fn

    def value(x: Tensor) -> Tensor:
        return loss(PairLogps(x, zero, one, one), reference, beta=beta, **entry.hyperparameters)

    expected = p * value(margin) + (1 - p) * value(-margin)
    return float(torch.autograd.grad(expected.sum(), margin)[0])


def _root(slope: Callable[[float], float], low: float, high: float) -> float:
    """Where a slope turns from negative to positive."""
    while low < (middle := 0.5 * (low + high)) < high:
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return high
