"""What the losses must do as functions: where they are least, and which are the same."""

from __future__ import annotations

import math

import pytest
import torch

from fastdaa.losses import LOSSES, MARGIN_FUNCTIONS, MarginFunction, daa, dpo, get_loss, ipo, slic
from fastdaa.outputs import BatchTotals, PairLogps

BETA, P, EPS = 0.3, 0.8, 0.1


def logit(p):
    return math.log(p / (1 - p))


def at_margin(h: torch.Tensor, name: str, **hyperparameters) -> torch.Tensor:
    ones, zeros = torch.ones_like(h, dtype=torch.int64), torch.zeros_like(h)
    policy, ref = PairLogps(h / 2, -h / 2, ones, ones), PairLogps(zeros, zeros, ones, ones)
    return get_loss(name).fn(policy, ref, beta=BETA, **hyperparameters)


def population_minimiser(p: float, name: str, **hyperparameters) -> float:
    """Margin with the least ``p l(h) + (1 - p) l(-h)``, by grids around the best point so far."""
    centre, width = 0.0, 20.0
    for _ in range(4):
        h = torch.linspace(centre - width, centre + width, 20001, dtype=torch.float64)
        risk = p * at_margin(h, name, **hyperparameters)
        risk = risk + (1 - p) * at_margin(-h, name, **hyperparameters)
        centre, width = h[risk.argmin()].item(), width / 100
    return centre


MINIMISERS = {
    "dpo": ("dpo", {}, P, logit(P) / BETA),
    "dpo-flipped": ("dpo", {}, 0.3, logit(0.3) / BETA),
    "cdpo": ("dpo", {"label_smoothing": EPS}, 1.0, logit(1 - EPS) / BETA),
    # With labels flipped at rate EPS, robust finds what dpo finds on clean labels.
    "robust": ("robust", {"label_smoothing": EPS}, P * (1 - EPS) + (1 - P) * EPS, logit(P) / BETA),
    "ipo": ("ipo", {}, P, (2 * P - 1) / (2 * BETA)),
    "ipo-unified": ("ipo", {"target": "unified"}, P, (2 * P - 1) / BETA),
    "slic": ("slic", {}, P, 1 / BETA),
    "slic-flipped": ("slic", {}, 0.4, -1 / BETA),
    "slic-delta": ("slic", {"delta": 0.5}, P, 0.5 / BETA),
    "truncated_quadratic": ("truncated_quadratic", {}, P, (2 * P - 1) / BETA),
    "exponential": ("exponential", {}, P, logit(P) / (2 * BETA)),
    "savage": ("savage", {}, P, logit(P) / BETA),
    "exo_pair": ("exo_pair", {"label_smoothing": EPS}, 1.0, logit(1 - EPS) / BETA),
    "sppo_hard": ("sppo_hard", {}, P, (2 * P - 1) / BETA),
}


@pytest.mark.parametrize("case", MINIMISERS)
def test_population_minimiser(case):
    name, hyperparameters, p, expected = MINIMISERS[case]
    # Near a smooth minimum fp64 tells values apart down to about 1e-7 of the argument.
    assert population_minimiser(p, name, **hyperparameters) == pytest.approx(expected, abs=2e-5)


def test_minimisers_at_beta_03_p_08_are_those_of_the_table():
    cases = ("dpo", "ipo", "ipo-unified", "slic")
    found = [population_minimiser(P, *MINIMISERS[c][:1], **MINIMISERS[c][1]) for c in cases]
    assert [round(h, 2) for h in found] == [4.62, 1.00, 2.00, 3.33]


def random_pairs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    draw = -60 * torch.rand(4, 257, generator=generator, dtype=torch.float64)
    draw[0, :2], draw[1, :2] = draw[2, :2], draw[3, :2]  # two margins of exactly 0
    draw = draw.to(dtype)
    lengths = torch.randint(1, 40, (2, 257), generator=generator)
    policy = PairLogps(draw[0].clone().requires_grad_(), draw[1].clone().requires_grad_(), *lengths)
    return policy, PairLogps(draw[2], draw[3], *lengths)


INSTANCES = {
    "dpo": ("logistic", dpo, {}),
    "ipo": ("squared", ipo, {"target": "unified"}),
    "slic": ("hinge", slic, {}),
    "truncated_quadratic": ("truncated_quadratic", LOSSES["truncated_quadratic"].fn, {}),
    "exponential": ("exponential", LOSSES["exponential"].fn, {}),
    "savage": ("savage", LOSSES["savage"].fn, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", INSTANCES)
def test_members_of_the_unified_family_are_the_direct_losses(case, dtype):
    g, fn, hyperparameters = INSTANCES[case]
    policy, ref = random_pairs(dtype)
    unified = daa(policy, ref, beta=BETA, g=g)
    direct = fn(policy, ref, beta=BETA, **hyperparameters)
    assert torch.equal(unified, direct)
    leaves = (policy.chosen, policy.rejected)
    for got, want in zip(
        torch.autograd.grad(unified.sum(), leaves),
        torch.autograd.grad(direct.sum(), leaves),
        strict=True,
    ):
        # The given derivative and the traced one may round differently.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=8 * eps, atol=eps)


@pytest.mark.parametrize("g", MARGIN_FUNCTIONS)
def test_given_derivatives_are_those_of_the_values(g):
    function = MARGIN_FUNCTIONS[g]
    x = torch.tensor(
        [-40.0, -2.0, 0.0, 0.3, 1.0, 1.7, 40.0], dtype=torch.float64, requires_grad=True
    )
    (traced,) = torch.autograd.grad(function.value(x).sum(), x)
    torch.testing.assert_close(function.derivative(x.detach()), traced, rtol=1e-14, atol=1e-15)


def test_daa_takes_any_value_and_derivative():
    quartic = MarginFunction(lambda x: (x - 1) ** 4, lambda x: 4 * (x - 1) ** 3)
    policy, ref = random_pairs()
    losses = daa(policy, ref, beta=0.05, g=quartic)
    h = (policy.chosen - ref.chosen - policy.rejected + ref.rejected).detach()
    torch.testing.assert_close(losses.detach(), (0.05 * h - 1) ** 4)
    (grad,) = torch.autograd.grad(losses.sum(), policy.chosen)
    torch.testing.assert_close(grad, 0.05 * 4 * (0.05 * h - 1) ** 3)
    same = daa(policy, ref, beta=0.05, g=(quartic.value, quartic.derivative))
    assert torch.equal(losses, same)


def test_unknown_names_inside_losses_raise():
    policy, ref = random_pairs()
    with pytest.raises(ValueError, match=r"expected g in .*'logistic'.* got 'logit'"):
        daa(policy, ref, g="logit")
    with pytest.raises(ValueError, match="expected target 'standard' or 'unified', got 'mean'"):
        ipo(policy, ref, target="mean")


def test_ipo_targets_differ_by_half_of_beta_and_its_square():
    """Unified IPO at beta is beta squared times standard IPO at beta / 2."""
    policy, ref = random_pairs()
    unified = ipo(policy, ref, beta=BETA, target="unified")
    torch.testing.assert_close(unified, BETA**2 * ipo(policy, ref, beta=BETA / 2))


@pytest.mark.parametrize(
    "name", [name for name, loss in LOSSES.items() if loss.level == "pair" and not loss.coupled]
)
def test_uncoupled_losses_see_each_pair_alone(name):
    policy, ref = random_pairs()
    whole = get_loss(name).fn(policy, ref)
    totals = {}
    if LOSSES[name].takes_totals:
        totals["totals"] = BatchTotals(257, int(policy.chosen_lengths.sum()))
    parts = [
        get_loss(name).fn(
            PairLogps(*(x[s] for x in policy)), PairLogps(*(x[s] for x in ref)), **totals
        )
        for s in (slice(0, 1), slice(1, 100), slice(100, 257))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.coupled])
def test_coupled_losses_change_when_split(name):
    policy, ref = random_pairs()
    shifted = PairLogps(policy.chosen + 60, *policy[1:])  # kto's baseline is positive
    whole = get_loss(name).fn(shifted, ref)
    first = get_loss(name).fn(
        PairLogps(*(x[:100] for x in shifted)), PairLogps(*(x[:100] for x in ref))
    )
    assert not torch.allclose(first, whole[:100], rtol=1e-6)
