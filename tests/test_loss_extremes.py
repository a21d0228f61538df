"""Every loss far from where training starts: fp32 against the paper's formula in 100 digits.

Margins from 1e-8 to 1e4 nats, and infinite ones. A gradient has to keep its digits as long as fp32
has a number for it: a badly ranked pair whose gradient rounds to 0 is never ranked well.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fastdaa.losses import LOSSES, MARGIN_FUNCTIONS, Objective, cpo, get_loss, slic_hf
from fastdaa.losses.elementary import expm1, sigmoid
from fastdaa.losses.weights import desensitized
from fastdaa.outputs import PairLogps

mp = pytest.importorskip("mpmath")  # PyTorch brings it along
BETA = 0.5
MARGINS = [0.0, *(s * h for h in (1e-8, 1e-3, 1, 10, 35, 50, 90, 200, 1e4) for s in (1, -1))]
INF, FAR = math.inf, 1e20  # at 1e20 nats every loss is at its limit, if that is finite


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(100):
        yield


def log_sig(x):
    return -mp.log1p(mp.exp(-x)) if x >= 0 else x - mp.log1p(mp.exp(x))


def sig(x):
    return mp.exp(log_sig(x))


def power(x):
    """``exp(x) - 1``, with the tangent above 30 that the documentation promises."""
    return mp.expm1(x) if x < 30 else mp.expm1(30) + mp.exp(30) * (x - 30)


def smoothed(x, eps=0.0):
    return -(1 - eps) * log_sig(x) - eps * log_sig(-x)


def exo(x, eps):
    return sig(x) * mp.log(sig(x) / (1 - eps)) + sig(-x) * (log_sig(-x) - mp.log(eps))


def discopop(x, tau):
    return sig(-x / tau) * -log_sig(x) + mp.exp(log_sig(x / tau) - x)


def of_margin(g):
    return lambda a, b, beta: g(beta * (a - b))


def f_dpo(score):
    return lambda a, b, beta: -log_sig(beta * (score(a) - score(b)))


def alpha_score(alpha):
    p = mp.mpf(alpha) - 1
    return lambda r: power(p * r) / p


def nca(a, b, beta):
    return -log_sig(beta * a) - (log_sig(-beta * a) + log_sig(-beta * b)) / 2


G = {
    "logistic": smoothed,
    "squared": lambda x: (x - 1) ** 2,
    "hinge": lambda x: max(0, 1 - x),
    "truncated_quadratic": lambda x: max(0, 1 - x) ** 2,
    "exponential": lambda x: power(-x) + 1,
    "savage": lambda x: sig(-x) ** 2,
}
DIVERGENCES = {
    "reverse_kl": lambda r: r,
    "forward_kl": lambda r: -power(-r),
    "js_divergence": log_sig,
}
FORMULAS = {  # f(a, b, beta) of the two log-ratios
    "dpo": ("dpo", {}, of_margin(smoothed)),
    "cdpo": ("dpo", {"label_smoothing": 0.1}, of_margin(partial(smoothed, eps=mp.mpf(0.1)))),
    "robust": (
        "robust",
        {"label_smoothing": 0.25},
        of_margin(lambda x: (-3 * log_sig(x) + log_sig(-x)) / 2),
    ),
    "robust-clean": ("robust", {"label_smoothing": 0.0}, of_margin(smoothed)),
    "ipo": ("ipo", {}, lambda a, b, beta: (a - b - 1 / (2 * beta)) ** 2),
    "ipo-unified": ("ipo", {"target": "unified"}, of_margin(G["squared"])),
    "slic": ("slic", {"delta": 0.75}, of_margin(lambda x: max(0, mp.mpf(0.75) - x))),
    **{name: (name, {}, of_margin(G[name])) for name in G if name in LOSSES},
    **{f"daa-{g}": ("daa", {"g": g}, of_margin(G[g])) for g in MARGIN_FUNCTIONS},
    **{
        f"exo_pair-{eps}": ("exo_pair", {"label_smoothing": eps}, of_margin(partial(exo, eps=eps)))
        for eps in (1e-6, 1e-3, 0.375)
    },
    **{
        f"discopop-{t}": ("discopop", {"discopop_tau": t}, of_margin(partial(discopop, tau=t)))
        for t in (0.001, 0.05, 0.9999, 1.0)
    },
    **{
        f"f_dpo-{kind}": ("f_dpo", {"f_divergence_type": kind}, f_dpo(score))
        for kind, score in DIVERGENCES.items()
    },
    **{
        f"f_dpo-{alpha}": (
            "f_dpo",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha},
            f_dpo(alpha_score(alpha)),
        )
        for alpha in (-1.0, 0.25, 1 - 1e-5, 1 + 1e-4, 2.0)
    },
    "apo_zero": ("apo_zero", {}, lambda a, b, beta: sig(-beta * a) + sig(beta * b)),
    "apo_down": ("apo_down", {}, lambda a, b, beta: sig(beta * a) + sig(-beta * (a - b))),
    "nca_pair": ("nca_pair", {}, nca),
    "bco_pair": ("bco_pair", {}, lambda a, b, beta: -log_sig(beta * a) - log_sig(-beta * b)),
    "sppo_hard": (
        "sppo_hard",
        {},
        lambda a, b, beta: (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2,
    ),
}  # fmt: skip


def expected(formula, a, b):
    """The loss and its derivatives by both log-ratios."""
    a, b, beta, step = mp.mpf(a), mp.mpf(b), mp.mpf(BETA), mp.mpf(10) ** -40

    def slope(da, db):
        up, down = formula(a + da, b + db, beta), formula(a - da, b - db, beta)
        return (up - down) / (2 * step)

    return formula(a, b, beta), slope(step, 0), slope(0, step)


def found(name, policy, ref, **hyperparameters):
    """The same of pairs in fp32; log-probs and gradients are ``[chosen, rejected]``."""
    policy = torch.tensor(policy).requires_grad_()
    ones = torch.ones(len(policy), dtype=torch.int64)
    sides = [PairLogps(*x.unbind(1), ones, ones) for x in (policy, torch.tensor(ref))]
    losses = get_loss(name).fn(*sides, **hyperparameters)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    return losses.tolist(), grad.tolist()


def close(got, want, slack=0.0):
    return abs(mp.mpf(got) - want) <= 1e-5 * abs(want) + slack + 1e-30


@pytest.mark.parametrize("case", FORMULAS)
def test_fp32_follows_the_formula_over_all_margins(case):
    name, given, formula = FORMULAS[case]
    ratios = [pair for h in MARGINS for pair in ((h, 0.0), (0.0, -h), (h / 2, -h / 2))]
    ratios = torch.tensor(ratios).tolist()  # as fp32 has them
    losses, grads = found(name, ratios, [(0.0, 0.0)] * len(ratios), beta=BETA, **given)
    for (a, b), loss, (by_a, by_b) in zip(ratios, losses, grads, strict=True):
        value, *slopes = expected(formula, a, b)
        assert close(loss, value, slack=1e-6), (a, b, loss, value)
        # The chosen completion's slope is the difference of two that may be equal.
        slack = 1e-6 * abs(slopes[1]) if name == "apo_down" else 0.0
        assert close(by_a, slopes[0], slack), (a, b, by_a, slopes[0])
        assert close(by_b, slopes[1]), (a, b, by_b, slopes[1])


EXCLUDED = {
    "chosen-by-reference": ((-5.0, -6.0), (-INF, -7.0)),
    "rejected-by-reference": ((-5.0, -6.0), (-7.0, -INF)),
    "chosen-by-policy": ((-INF, -6.0), (-5.0, -7.0)),
    "rejected-by-policy": ((-5.0, -INF), (-5.0, -7.0)),
}


@pytest.mark.parametrize("excluded", EXCLUDED)
@pytest.mark.parametrize("case", FORMULAS)
def test_a_completion_without_probability_has_the_limits_of_the_formula(case, excluded):
    name, given, formula = FORMULAS[case]
    policy, ref = EXCLUDED[excluded]
    (loss,), (grads,) = found(name, [policy], [ref], beta=BETA, **given)
    a, b = (max(min(p - r, FAR), -FAR) for p, r in zip(policy, ref, strict=True))
    for got, want in zip((loss, *grads), expected(formula, a, b), strict=True):
        if abs(want) > 1e15:
            assert got == mp.sign(want) * INF
        else:
            assert close(got, want), (got, want)


def test_every_loss_of_log_ratios_is_covered():
    alone = {name for name, loss in LOSSES.items() if loss.level == "pair" and not loss.coupled}
    assert {name for name, *_ in FORMULAS.values()} == {n for n in alone if LOSSES[n].needs_ref}


@pytest.mark.parametrize("ours", [sigmoid, expm1])
def test_slopes_of_elementary_functions(ours):
    x = torch.tensor([-85.0, -40.0, -17.0, -1.5, -0.5, 0.0, 1e-4, 0.5, 17.0, 40.0, 85.0])
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ours(x).sum(), x)
    for point, got in zip(x.tolist(), grad.tolist(), strict=True):
        want = mp.exp(point) if ours is expm1 else sig(point) * sig(-point)
        assert close(got, want), (point, got, want)
    torch.testing.assert_close(ours(x.detach()), getattr(torch, ours.__name__)(x.detach()))
    for bad in (INF, -INF, math.nan):
        got, want = ours(torch.tensor(bad)), getattr(torch, ours.__name__)(torch.tensor(bad))
        torch.testing.assert_close(got, want, equal_nan=True)


def test_kto_keeps_its_digits():
    ratios = [(-80.0, 70.0), (60.0, -50.0), (-30.0, -30.0), (10.0, 20.0)]
    _, grads = found("kto", ratios, [(0.0, 0.0)] * 4, beta=BETA)  # the baseline is 0
    for (a, b), (by_a, by_b) in zip(ratios, grads, strict=True):
        u, v = BETA * mp.mpf(a), -BETA * mp.mpf(b)
        assert close(by_a, -BETA * sig(u) * sig(-u) / 2)
        assert close(by_b, BETA * sig(v) * sig(-v) / 2)


@pytest.mark.parametrize("side", [0, 1], ids=["chosen", "rejected"])
def test_kto_and_aot_beside_a_completion_that_the_reference_excludes(side):
    policy, ref = [[-5.0, -6.0], [-4.0, -3.0]], [[-4.0, -6.5], [-4.5, -3.0]]
    ref[0][side] = -INF
    # The baseline is infinite: chosen completions are below it, but the excluded one is not.
    losses, grads = found("kto", policy, ref)
    assert losses == ([0.0, 0.5] if side == 0 else [1.0, 0.5])
    assert grads == [[0.0, 0.0]] * 2
    for name in ("aot", "aot_unpaired"):
        losses, grads = found(name, policy, ref)
        assert not any(map(math.isnan, [*losses, *grads[0], *grads[1]])), name


@pytest.mark.parametrize(
    ("fn", "switch"), [(slic_hf, "regularization"), (cpo, "nll_weight")], ids=["slic_hf", "cpo"]
)
def test_a_likelihood_of_no_weight_is_not_read(fn, switch):
    ones = torch.ones(1, dtype=torch.int64)
    excluded = PairLogps(torch.tensor([-INF]), torch.tensor([-INF]), ones, ones)
    assert fn(excluded._replace(rejected=torch.tensor([-3.0])), None, **{switch: 0.0}) == INF
    assert fn(excluded._replace(chosen=torch.tensor([-3.0])), None, **{switch: 0.0}) == 0


def test_tokens_without_weight_may_be_excluded():
    logps, tail = torch.tensor([-1.0, -2.0, -INF]), torch.tensor([False, False, True])
    assert desensitized(logps, tail, 0.0).tolist() == [-1.0, -2.0, 0.0]
    assert desensitized(logps, tail, 0.5).tolist() == [-1.0, -2.0, -INF]


@pytest.mark.parametrize("lam", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("name", ["apa", "awr"])
def test_token_losses_follow_their_formula(name, lam):
    logps = torch.tensor([0.0, -1e-8, -1.0, -1e4] * 2, requires_grad=True)
    ref = torch.tensor([-1.0, 0.0, -1.0, -9e3] * 2)
    advantages = [1e-8, -50.0, 1e4, -1e4]
    losses = Objective.parse(name, lam=lam).token_losses(
        logps, ref, torch.tensor([2] * 4), advantages=torch.tensor(advantages)
    )
    (grad,) = torch.autograd.grad(losses.sum() * 8 / 2, logps)  # of 2 pairs with 8 tokens
    for i, got in enumerate(grad.tolist()):
        tilt = mp.mpf(torch.tensor(advantages)[i // 2].item()) / mp.mpf(lam)
        error = mp.mpf(logps[i].item()) - mp.mpf(ref[i].item()) - tilt
        assert close(got, 2 * error if name == "apa" else -min(mp.exp(tilt), 20))
