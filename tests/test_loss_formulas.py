"""Every pair loss: value and gradient against formulas written by hand, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from fastdaa.losses import LOSSES, get_loss
from fastdaa.outputs import PairLogps

LENGTHS = (torch.tensor([5, 12, 3, 20]), torch.tensor([7, 9, 4, 11]))


def example() -> tuple[PairLogps, PairLogps]:
    """Log-ratios a = (1.5, -4, -0.7, 2.25), b = (-3, 0.5, -1.1, 1.25); their mean is negative."""
    ref = [-12.5, -30.0, -6.5, -55.25], [-15.0, -22.5, -9.4, -31.25]
    policy = [-11.0, -34.0, -7.2, -53.0], [-18.0, -22.0, -10.5, -30.0]
    ref = [torch.tensor(side, dtype=torch.float64) for side in ref]
    policy = [torch.tensor(side, dtype=torch.float64, requires_grad=True) for side in policy]
    return PairLogps(*policy, *LENGTHS), PairLogps(*ref, *LENGTHS)


def gradients(name, policy, ref, **kwargs):
    losses = get_loss(name).fn(policy, ref, **kwargs)
    inputs = (policy.chosen, policy.rejected)
    # Likelihood terms do not read the rejected side: materialize_grads makes that a zero.
    return losses.detach(), torch.autograd.grad(losses.sum(), inputs, materialize_grads=True)


def sig(x):
    return 1 / (1 + torch.exp(-x))


def margin_form(value, slope, normalise=False):
    """A closed form of h, from its value and its derivative in h."""

    def form(a, b, n_w, n_l):
        n_w, n_l = (n_w, n_l) if normalise else (1.0, 1.0)
        h = a / n_w - b / n_l
        return value(h), slope(h) / n_w, -slope(h) / n_l

    return form


def r_dpo(a, b, n_w, n_l):
    x = 0.3 * (a - b) + 0.05 * (n_w - n_l).double()
    return torch.log1p(torch.exp(-x)), -0.3 * sig(-x), 0.3 * sig(-x)


def apo_zero(a, b, n_w, n_l):
    a, b = 0.3 * a, 0.3 * b
    return 1 - sig(a) + sig(b), -0.3 * sig(a) * sig(-a), 0.3 * sig(b) * sig(-b)


def apo_down(a, b, n_w, n_l):
    a, h = 0.3 * a, 0.3 * (a - b)
    pull = 0.3 * sig(h) * sig(-h)
    return sig(a) + 1 - sig(h), 0.3 * sig(a) * sig(-a) - pull, pull


def nca(a, b, n_w, n_l):
    a, b = 0.3 * a, 0.3 * b
    value = -torch.log(sig(a)) - 0.5 * torch.log(sig(-a)) - 0.5 * torch.log(sig(-b))
    return value, 0.3 * (0.5 * sig(a) - sig(-a)), 0.15 * sig(b)


def bco(a, b, n_w, n_l):
    a, b = 0.3 * a, 0.3 * b
    return -torch.log(sig(a)) - torch.log(sig(-b)), -0.3 * sig(-a), 0.3 * sig(b)


def sppo(a, b, n_w, n_l):
    target = 1 / 0.6
    return (a - target) ** 2 + (b + target) ** 2, 2 * (a - target), 2 * (b + target)


def kto(a, b, n_w, n_l):
    z0 = max(0.0, float(torch.cat([a, b]).sum()) / 8)
    u, v = 0.3 * (a - z0), 0.3 * (z0 - b)
    value = (1.5 * (1 - sig(u)) + 0.5 * (1 - sig(v))) / 2
    return value, -0.75 * 0.3 * sig(u) * sig(-u), 0.25 * 0.3 * sig(v) * sig(-v)


def aot_unpaired(a, b, n_w, n_l):
    """Ranks by hand: a sorts to pairs (1, 2, 0, 3), b to pairs (0, 2, 1, 3)."""
    order_a, order_b = torch.tensor([1, 2, 0, 3]), torch.tensor([0, 2, 1, 3])
    x = 0.3 * (a[order_a] - b[order_b])
    pull = 0.3 * (sig(-x) - 0.2)
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    grad_a[order_a], grad_b[order_b] = -pull, pull
    return -0.8 * torch.log(sig(x)) - 0.2 * torch.log(sig(-x)), grad_a, grad_b


def exo_value(h, eps=0.01):
    q = sig(0.3 * h)
    return q * torch.log(q / (1 - eps)) + (1 - q) * torch.log((1 - q) / eps)


def exo_slope(h, eps=0.01):
    q = sig(0.3 * h)
    return 0.3 * q * (1 - q) * (0.3 * h + math.log(eps / (1 - eps)))


def discopop_value(h, tau=0.5):
    m = sig(0.3 * h / tau)
    return (1 - m) * torch.log1p(torch.exp(-0.3 * h)) + m * torch.exp(-0.3 * h)


def discopop_slope(h, tau=0.5):
    x, m = 0.3 * h, sig(0.3 * h / tau)
    blend = m * (1 - m) / tau * (torch.exp(-x) - torch.log1p(torch.exp(-x)))
    return 0.3 * (blend - (1 - m) * sig(-x) - m * torch.exp(-x))


def softplus(x):
    return torch.log1p(torch.exp(x))


def f_dpo(score, slope):
    """From ``f'(u)`` and its derivative by ``log u``, for a ratio u."""

    def form(a, b, n_w, n_l):
        x = 0.3 * (score(torch.exp(a)) - score(torch.exp(b)))
        pull = 0.3 * sig(-x)
        return softplus(-x), -pull * slope(torch.exp(a)), pull * slope(torch.exp(b))

    return form


B, T = 0.3, 1 / 0.6  # beta and 1 / (2 beta)
CLOSED_FORMS = {
    "dpo": (
        ("dpo", {}),
        margin_form(lambda h: softplus(-B * h), lambda h: -B * sig(-B * h)),
    ),
    "cdpo": (
        ("dpo", {"label_smoothing": 0.2}),
        margin_form(
            lambda h: 0.8 * softplus(-B * h) + 0.2 * softplus(B * h),
            lambda h: -B * (sig(-B * h) - 0.2),
        ),
    ),
    "rdpo": (("dpo", {"length_alpha": 0.05}), r_dpo),
    "dpo-length-norm": (
        ("dpo", {"length_norm": True}),
        margin_form(lambda h: softplus(-B * h), lambda h: -B * sig(-B * h), normalise=True),
    ),
    "f-dpo-reverse": (
        ("f_dpo", {"f_divergence_type": "reverse_kl"}),
        f_dpo(torch.log, torch.ones_like),
    ),
    "f-dpo-forward": (
        ("f_dpo", {"f_divergence_type": "forward_kl"}),
        f_dpo(lambda u: 1 - 1 / u, lambda u: 1 / u),
    ),
    "f-dpo-js": (
        ("f_dpo", {"f_divergence_type": "js_divergence"}),
        f_dpo(lambda u: torch.log(2 * u / (1 + u)), lambda u: 1 / (1 + u)),
    ),
    "f-dpo-alpha": (
        ("f_dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
        f_dpo(lambda u: (u**-0.7 - 1) / -0.7, lambda u: u**-0.7),
    ),
    "f-dpo-alpha-above-1": (
        ("f_dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5}),
        f_dpo(lambda u: (u**0.5 - 1) / 0.5, lambda u: u**0.5),
    ),
    "f-dpo-alpha-near-1": (
        ("f_dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 + 1e-7}),
        f_dpo(torch.log, torch.ones_like),
    ),
    "robust": (
        ("robust", {"label_smoothing": 0.2}),
        margin_form(
            lambda h: (0.8 * softplus(-B * h) - 0.2 * softplus(B * h)) / 0.6,
            lambda h: -B * (0.8 * sig(-B * h) + 0.2 * sig(B * h)) / 0.6,
        ),
    ),
    "ipo": (("ipo", {}), margin_form(lambda h: (h - T) ** 2, lambda h: 2 * (h - T))),
    "ipo-unified": (
        ("ipo", {"target": "unified"}),
        margin_form(lambda h: (B * h - 1) ** 2, lambda h: 2 * B * (B * h - 1)),
    ),
    "ipo-length-norm": (
        ("ipo", {"length_norm": True}),
        margin_form(lambda h: (h - T) ** 2, lambda h: 2 * (h - T), normalise=True),
    ),
    "slic": (
        ("slic", {"delta": 0.5}),
        margin_form(lambda h: (0.5 - B * h) * (B * h < 0.5), lambda h: -B * (B * h < 0.5).double()),
    ),
    "truncated_quadratic": (
        ("truncated_quadratic", {}),
        margin_form(
            lambda h: ((1 - B * h) * (B * h < 1)) ** 2,
            lambda h: -2 * B * (1 - B * h) * (B * h < 1),
        ),
    ),
    "exponential": (
        ("exponential", {}),
        margin_form(lambda h: torch.exp(-B * h), lambda h: -B * torch.exp(-B * h)),
    ),
    "savage": (
        ("savage", {}),
        margin_form(
            lambda h: (1 + torch.exp(B * h)) ** -2,
            lambda h: -2 * B * sig(-B * h) ** 2 * sig(B * h),
        ),
    ),
    "exo_pair": (("exo_pair", {"label_smoothing": 0.01}), margin_form(exo_value, exo_slope)),
    "discopop": (
        ("discopop", {"discopop_tau": 0.5}),
        margin_form(discopop_value, discopop_slope),
    ),
    "apo_zero": (("apo_zero", {}), apo_zero),
    "apo_down": (("apo_down", {}), apo_down),
    "nca_pair": (("nca_pair", {}), nca),
    "bco_pair": (("bco_pair", {}), bco),
    "sppo_hard": (("sppo_hard", {}), sppo),
    "kto": (("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.5}), kto),
    "aot_unpaired": (("aot_unpaired", {"label_smoothing": 0.2}), aot_unpaired),
}


@pytest.mark.parametrize("case", CLOSED_FORMS)
def test_value_and_gradient_match_the_closed_form(case):
    (name, hyperparameters), form = CLOSED_FORMS[case]
    policy, ref = example()
    losses, (grad_w, grad_l) = gradients(name, policy, ref, beta=B, **hyperparameters)
    with torch.no_grad():
        expected = form(policy.chosen - ref.chosen, policy.rejected - ref.rejected, *LENGTHS)
    for got, want in zip((losses, grad_w, grad_l), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_kto_baseline_is_the_clamped_mean_log_ratio_and_carries_no_gradient():
    policy, ref = example()
    with torch.no_grad():
        policy.chosen.add_(3.0)  # the mean log-ratio becomes positive
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    losses, (grad_w, grad_l) = gradients("kto", policy, ref, beta=B, **weights)
    with torch.no_grad():
        a, b = policy.chosen - ref.chosen, policy.rejected - ref.rejected
        assert torch.cat([a, b]).mean() > 0.5
        value, want_w, want_l = kto(a, b, *LENGTHS)
    torch.testing.assert_close(losses, value, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grad_w, want_w, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grad_l, want_l, rtol=1e-13, atol=1e-14)


def test_aot_ranks_the_margins_of_policy_and_reference_separately():
    policy, ref = example()
    losses, (grad_w, grad_l) = gradients("aot", policy, ref, beta=B)
    order = torch.tensor([3, 1, 2, 0])  # policy margins are 7, -12, 3.3, -23
    ref_sorted = torch.tensor([-24.0, -7.5, 2.5, 2.9], dtype=torch.float64)
    x = B * (torch.tensor([-23.0, -12.0, 3.3, 7.0], dtype=torch.float64) - ref_sorted)
    torch.testing.assert_close(losses, softplus(-x), rtol=1e-12, atol=1e-13)
    want = torch.zeros(4, dtype=torch.float64)
    want[order] = -B * sig(-x)
    torch.testing.assert_close(grad_w, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad_l, -want, rtol=1e-12, atol=1e-13)


def sft_form(s_w, s_l, n_w, n_l):
    return -s_w * 4 / 40, torch.full_like(s_w, -0.1), torch.zeros_like(s_l)


def slic_hf_form(s_w, s_l, n_w, n_l):
    active = (s_w - s_l < 6.5).double()
    return (6.5 - s_w + s_l) * active - 0.25 * s_w, -active - 0.25, active


def simpo_form(s_w, s_l, n_w, n_l):
    x = 2.5 * (s_w / n_w - s_l / n_l) - 0.75
    pull = 2.5 * (sig(-x) - 0.2)
    return -0.8 * torch.log(sig(x)) - 0.2 * torch.log(sig(-x)), -pull / n_w, pull / n_l


def cpo_form(s_w, s_l, n_w, n_l):
    x = 0.3 * (s_w - s_l)
    return softplus(-x) - 0.5 * s_w / 10, -0.3 * sig(-x) - 0.05, 0.3 * sig(-x)


def orpo_form(s_w, s_l, n_w, n_l):
    p_w, p_l = torch.exp(s_w / n_w), torch.exp(s_l / n_l)
    x = torch.log(p_w / (1 - p_w)) - torch.log(p_l / (1 - p_l))
    pull = 0.3 * sig(-x)  # d log odds / d mean logp = 1 / (1 - p)
    return 0.3 * softplus(-x) - s_w / 10, -pull / (1 - p_w) / n_w - 0.1, pull / (1 - p_l) / n_l


REFERENCE_FREE = {
    "sft": ({}, sft_form),
    "slic_hf": ({"delta": 6.5, "regularization": 0.25}, slic_hf_form),
    "simpo": ({"beta": 2.5, "gamma": 0.75, "label_smoothing": 0.2}, simpo_form),
    "cpo": ({"beta": 0.3, "nll_weight": 0.5}, cpo_form),
    "orpo": ({"beta": 0.3}, orpo_form),
}


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_reference_free_losses_match_the_closed_form(name):
    hyperparameters, form = REFERENCE_FREE[name]
    policy, ref = example()
    losses, (grad_w, grad_l) = gradients(name, policy, None, **hyperparameters)
    assert torch.equal(losses, gradients(name, policy, ref, **hyperparameters)[0])
    with torch.no_grad():
        expected = form(policy.chosen, policy.rejected, *LENGTHS)
    for got, want in zip((losses, grad_w, grad_l), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_every_loss_has_a_closed_form_here():
    here = {name for (name, _), _ in CLOSED_FORMS.values()} | set(REFERENCE_FREE) | {"aot", "daa"}
    assert here == {name for name, loss in LOSSES.items() if loss.level == "pair"}
