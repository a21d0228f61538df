"""The objective kernel against ``fastdaa.losses`` and autograd in fp64, over the whole registry.

Without a GPU it runs in Triton's interpreter (conftest.py).
"""

from __future__ import annotations

import math

import pytest
import torch

from fastdaa import BatchTotals, Objective, PairLogps
from fastdaa.losses import ALIASES, LOSSES, MARGIN_FUNCTIONS

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastdaa.kernels.objective import evaluate_pairs, evaluate_tokens  # noqa: E402
from fastdaa.kernels.objective_functions import (  # noqa: E402
    EXPONENT_LIMIT,
    LARGEST_MEAN_LOGP,
    PAIR_OBJECTIVES,
    TOKEN_OBJECTIVES,
)
from fastdaa.losses.margin import EXPONENT_LIMIT as TRUE_EXPONENT_LIMIT  # noqa: E402
from fastdaa.losses.reference_free import LARGEST_MEAN_LOGP as TRUE_MEAN_LOGP  # noqa: E402
from fastdaa.objective_kernel import evaluate_objective  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
# Hyperparameters that fp32 holds exactly, so that nothing but the formula is compared.
EXACT = {
    "beta": 0.125, "label_smoothing": 0.125, "length_alpha": 0.25, "delta": 1.0,
    "regularization": 0.125, "gamma": 0.5, "nll_weight": 0.5, "discopop_tau": 0.0625, "lam": 0.5,
}  # fmt: skip
SINGLE = [name for name, loss in LOSSES.items() if not loss.coupled]
VARIANTS = {
    **{name: (name, {}) for name in SINGLE},
    "dpo-length-norm": ("dpo", {"length_norm": True, "beta": 2.0}),
    "ipo-length-norm": ("ipo", {"length_norm": True}),
    "ipo-unified": ("ipo", {"target": "unified"}),
    "f_dpo-reverse": ("f_dpo", {"f_divergence_type": "reverse_kl"}),
    "f_dpo-forward": ("f_dpo", {"f_divergence_type": "forward_kl"}),
    "f_dpo-alpha": ("f_dpo", {"f_divergence_type": "alpha_divergence"}),
    "f_dpo-alpha-2": (
        "f_dpo",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0},
    ),
    "f_dpo-alpha-near-1": (
        "f_dpo",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - 2**-13},
    ),
    "ipo-unified-length-norm": ("ipo", {"target": "unified", "length_norm": True}),
    **{f"daa-{g}": ("daa", {"g": g}) for g in MARGIN_FUNCTIONS},
    **{alias: (alias, {}) for alias in ("cdpo", "rdpo", "dpo_norm", "sigmoid", "apa")},
}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that a kernel has to fill holds NaN before."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()


class Batch:
    """Pairs of every kind: tokens of both completions, and how far the reference is from them."""

    def __init__(self):
        some = -torch.rand(700) * 4
        kinds = [
            (some[:5], some[5:12], 0.3),
            (some[12:15], some[15:16], 0.3),
            (some[:0], some[16:20], 0.3),  # an empty chosen completion
            (some[20:24], some[:0], 0.3),
            (some[:0], some[:0], 0.0),
            (some[24:34], some[34:40], 0.0),  # policy and reference are the same
            (some[40:50], some[50:60] - 900, 0.0),
            (some[60:70] - 900, some[70:80], 0.0),
            (some[80:83] * 0, some[83:85] * 0, 0.0),  # certain
            (some[:600], some[100:700], 0.3),  # more than a block of tokens
        ]
        parts = [part for chosen, rejected, _ in kinds for part in (chosen, rejected)]
        noise = [n for _, _, n in kinds for _ in range(2)]
        refs = [part + torch.randn_like(part) * n for part, n in zip(parts, noise, strict=True)]
        refs[12], refs[13] = parts[12] - 90, parts[13] + 1800  # a huge margin
        refs[14], refs[15] = parts[14] + 1800, parts[15] - 90
        self.logps, self.ref = torch.cat(parts).to(DEVICE), torch.cat(refs).to(DEVICE)
        self.lengths = torch.tensor([len(part) for part in parts], device=DEVICE)
        self.completion = self.lengths + torch.tensor([0, 1] * len(kinds), device=DEVICE)
        self.totals = BatchTotals(16, 1024, 2048)
        self.sums = self.sum(self.logps)
        self.ref_sums = self.sum(self.ref)

    def sum(self, values):
        """Sequence sums in fp64, rounded once."""
        parts = values.double().split(self.lengths.tolist())
        return torch.stack([part.sum() for part in parts]).float()

    def truth(self, objective, advantages=None):
        """Losses and derivatives by sequence and token, all in fp64."""
        tokens = self.logps.double().requires_grad_()
        sums, ref = self.sums.double().requires_grad_(), self.ref_sums.double()
        args = [self.halves(values) for values in (sums, ref)]
        token_losses = None
        if objective.has_token_level:
            token_losses = objective.token_losses(
                tokens, self.ref.double(), self.lengths, advantages=advantages,
                pairs=self.totals.pairs, tokens=self.totals.tokens,
            )  # fmt: skip
        losses = objective(*args, self.totals, token_losses)
        by_sums, by_tokens = torch.autograd.grad(losses.sum(), (sums, tokens), allow_unused=True)
        per_token = torch.zeros_like(tokens) if by_tokens is None else by_tokens
        if by_sums is not None:
            per_token = per_token + by_sums.repeat_interleave(self.lengths)
        return losses.detach(), by_sums, per_token

    def halves(self, values):
        pairs, lengths = values.view(-1, 2), self.completion.view(-1, 2)
        return PairLogps(pairs[:, 0], pairs[:, 1], lengths[:, 0], lengths[:, 1])

    def evaluate(self, objective, **kwargs):
        given = {"ref_logps": self.ref_sums, "ref_token_logps": self.ref} | kwargs
        return evaluate_objective(
            objective, self.logps, self.lengths, totals=self.totals,
            completion_lengths=self.completion, **given,
        )  # fmt: skip


def close(name, got, truth, relative, absolute=0.0):
    assert got.dtype == torch.float32, name
    allowed = relative * truth.abs() + absolute + 1e-37
    wrong = (got.double() - truth).abs() > allowed
    assert not wrong.any(), f"{name}: {got[wrong]} is not {truth[wrong]}"
    assert not got.isnan().any(), name


def test_the_registry_is_covered():
    pair_level = {name for name in SINGLE if LOSSES[name].level == "pair"}
    parts = {"ipo_unified": "ipo", "f_dpo_js": "f_dpo", "f_dpo_alpha": "f_dpo"}
    assert set(PAIR_OBJECTIVES) == pair_level - {"daa", "f_dpo"} | set(parts)
    assert set(TOKEN_OBJECTIVES) == set(SINGLE) - pair_level
    assert EXPONENT_LIMIT.value == TRUE_EXPONENT_LIMIT
    assert LARGEST_MEAN_LOGP.value == TRUE_MEAN_LOGP
    for name, jitted in PAIR_OBJECTIVES.items():
        loss = LOSSES[parts.get(name, name)]
        assert jitted.needs_ref == loss.needs_ref and jitted.needs_totals == loss.takes_totals
        taken = {*jitted.parameters} | ({"length_norm"} if jitted.takes_length_norm else set())
        made_of = {"target", "f_divergence_type", "f_alpha_divergence_coef"}
        assert taken - {"exponent"} == set(loss.hyperparameters) - made_of


@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_derivatives_are_those_of_the_specification(variant):
    name, given = VARIANTS[variant]
    defaults = LOSSES[ALIASES.get(name, (name,))[0]].hyperparameters
    given = {k: v for k, v in EXACT.items() if k in defaults} | given
    objective, batch = Objective.parse(name, **given), Batch()
    got, (losses, by_sums, by_tokens) = batch.evaluate(objective), batch.truth(objective)
    close("losses", got.losses, losses, 2 * EPS)
    close("token_coefficients", got.token_coefficients, by_tokens, 2 * EPS)
    if by_sums is not None:
        close("coefficients", got.coefficients, by_sums, 2 * EPS)
    else:
        assert got.coefficients is None
    assert torch.equal(got.sequence_logps, batch.sums)


@pytest.mark.parametrize("name", SINGLE)
def test_default_hyperparameters(name):
    """They are rounded to fp32 on their way, which an exponential magnifies."""
    objective, batch = Objective.parse(name), Batch()
    got, (losses, _, by_tokens) = batch.evaluate(objective), batch.truth(objective)
    close("losses", got.losses, losses, 2e-6, 1e-6)
    close("token_coefficients", got.token_coefficients, by_tokens, 2e-6, 1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dpo", "slic", "orpo", "exo_pair", "apa_pairs"])
def test_some_objectives_on_a_gpu(name):
    test_default_hyperparameters(name)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        pytest.param(["dpo", "sft"], [1.0, 0.25], id="pairs"),
        pytest.param(["dpo"], [0.5], id="one-weighted"),
        pytest.param(["ipo", "apa"], [0.5, 2.0], id="pairs-and-tokens"),
    ],
)
def test_mixtures(names, weights):
    objective, batch = Objective.parse(names, weights=weights, beta=0.125), Batch()
    got, (losses, by_sums, by_tokens) = batch.evaluate(objective), batch.truth(objective)
    close("losses", got.losses, losses, 4 * EPS, 1e-5)
    close("token_coefficients", got.token_coefficients, by_tokens, 4 * EPS, 1e-6)
    if objective.has_token_level:
        assert got.coefficients is None
    else:
        close("coefficients", got.coefficients, by_sums, 4 * EPS, 1e-7)


def test_rewards_margins_and_accuracies():
    batch = Batch()
    got = batch.evaluate(Objective.parse("dpo", beta=0.125))
    rewards = 0.125 * (batch.sums - batch.ref_sums)
    assert torch.equal(got.rewards, rewards)
    assert torch.equal(got.margins, rewards[::2] - rewards[1::2])
    assert torch.equal(got.accuracies, (rewards[::2] > rewards[1::2]).float())
    without = batch.evaluate(Objective.parse("simpo", beta=2.0), ref_logps=None,
                             ref_token_logps=None)  # fmt: skip
    assert torch.equal(without.rewards, 2.0 * batch.sums)


@pytest.mark.parametrize("per_token", [True, False], ids=["ref-tokens", "ref-sequences"])
def test_equal_policy_and_reference_give_exactly_ln_2(per_token):
    logps = -torch.rand(1500, device=DEVICE) * 20
    offsets = torch.tensor([0, 700, 701, 701, 1500], device=DEVICE)
    kwargs = {"ref_token_logps": logps.clone()}
    dpo = PAIR_OBJECTIVES["dpo"].fn
    if not per_token:
        sums = evaluate_pairs(dpo, logps, offsets, parameters=(0.1,), **kwargs).sequence_logps
        kwargs = {"ref_logps": sums}
    got = evaluate_pairs(dpo, logps, offsets, parameters=(0.1,), **kwargs)
    assert (got.losses == torch.tensor(math.log(2.0))).all()
    assert (got.margins == 0).all() and (got.rewards == 0).all()


def test_long_sums_are_right_to_a_rounding():
    logps = -10 - torch.rand(7000, device=DEVICE)
    offsets = torch.tensor([0, 512, 4608, 4608, 7000], device=DEVICE)
    got = evaluate_pairs(PAIR_OBJECTIVES["sft"].fn, logps, offsets, needs_ref=False).sequence_logps
    truth = torch.stack([p.double().sum() for p in logps.split([512, 4096, 0, 2392])])
    assert torch.equal(got, truth.float())
    assert (got[0] - truth[0]).abs() < 1e-3


def test_a_sum_keeps_what_fp32_would_drop():
    """Beside 2^24 a token of -1 is nothing to fp32, and eight of them are."""
    logps = torch.zeros(9 * 512, device=DEVICE)
    logps[0], logps[512::512] = -(2.0**24), -1.0
    offsets = torch.tensor([0, len(logps), len(logps)], device=DEVICE)
    got = evaluate_pairs(PAIR_OBJECTIVES["sft"].fn, logps, offsets, needs_ref=False).sequence_logps
    assert got.tolist() == [-(2.0**24) - 8, 0.0]


def test_a_sequence_has_the_same_bits_in_every_batch():
    pair = -torch.rand(1300, device=DEVICE) * 12
    sft = PAIR_OBJECTIVES["sft"].fn
    alone = evaluate_pairs(sft, pair, torch.tensor([0, 900, 1300], device=DEVICE), needs_ref=False)
    logps = torch.cat([torch.randn(77, device=DEVICE), pair])
    offsets = torch.tensor([0, 70, 77, 977, 1377], device=DEVICE)
    later = evaluate_pairs(sft, logps, offsets, needs_ref=False)
    assert torch.equal(later.sequence_logps[2:], alone.sequence_logps)


def test_a_satisfied_hinge_has_a_derivative_of_zero():
    """At the kink, beyond it, and just before it; beta * h is exact."""
    logps = torch.tensor([8.0, 0.0, 9.0, 0.0, 7.0, 0.0], device=DEVICE)
    got = evaluate_pairs(
        PAIR_OBJECTIVES["slic"].fn, logps, torch.arange(7, device=DEVICE),
        ref_logps=torch.zeros(6, device=DEVICE), parameters=(0.125, 1.0), token_coefficients=True,
    )  # fmt: skip
    assert got.losses.tolist() == [0.0, 0.0, 0.125]
    assert got.coefficients.tolist() == [0.0, 0.0, 0.0, 0.0, -0.125, 0.125]
    assert torch.equal(got.token_coefficients, got.coefficients)


@pytest.mark.parametrize("name", ["apa", "awr"])
def test_advantages(name):
    objective, batch = Objective.parse(name, lam=0.5), Batch()
    advantages = torch.randn(len(batch.lengths), device=DEVICE)
    got = batch.evaluate(objective, advantages=advantages)
    losses, _, by_tokens = batch.truth(objective, advantages.double())
    close("losses", got.losses, losses, 2e-6)
    close("token_coefficients", got.token_coefficients, by_tokens, 2e-6)


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_advantages_that_nothing_reads_are_refused(name):
    batch = Batch()
    with pytest.raises(ValueError, match=f"advantages: expected None for {name}.*, got some"):
        batch.evaluate(Objective.parse(name), advantages=torch.zeros(20, device=DEVICE))


def test_no_pair():
    none = torch.zeros(0, device=DEVICE)
    offsets = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    got = evaluate_pairs(PAIR_OBJECTIVES["dpo"].fn, none, offsets, ref_logps=none)
    assert all(values.numel() == 0 for values in got if values is not None)


@triton.jit
def _product_of_ratios(
    a, b, chosen_length, rejected_length, p0, p1, p2, likelihood, LENGTH_NORM: tl.constexpr
):
    return p0 * a * b, p0 * b, p0 * a


def test_an_objective_of_the_caller():
    batch = Batch()
    offsets = torch.nn.functional.pad(batch.lengths.cumsum(0), (1, 0))
    got = evaluate_pairs(
        _product_of_ratios, batch.logps, offsets, ref_logps=batch.ref_sums, parameters=(0.5,)
    )
    ratios = (batch.sums.double() - batch.ref_sums.double()).view(-1, 2)
    close("losses", got.losses, 0.5 * ratios.prod(dim=1), 2 * EPS)
    close("coefficients", got.coefficients, 0.5 * ratios.flip(1).reshape(-1), 2 * EPS)


LOGPS, OFFSETS = torch.zeros(4), torch.tensor([0, 2, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"ref_logps": None}, "got neither", id="no-reference"),
        pytest.param({"ref_token_logps": LOGPS}, "got both", id="two-references"),
        pytest.param({"ref_logps": torch.zeros(3)}, "ref_logps: expected shape", id="ref-shape"),
        pytest.param({"token_logps": LOGPS.double()}, "in fp32", id="dtype"),
        pytest.param({"offsets": torch.tensor([0, 4])}, "2B", id="one-sequence"),
        pytest.param({"parameters": (0.1,) * 4}, "at most 3", id="parameters"),
        pytest.param({"token_logps": torch.zeros(4, 2)[:, 0]}, "contiguous", id="gaps"),
    ],
)
def test_pairs_that_do_not_fit(change, message):
    given = {"token_logps": LOGPS, "offsets": OFFSETS, "ref_logps": torch.zeros(2)} | change
    with pytest.raises(ValueError, match=message):
        evaluate_pairs(PAIR_OBJECTIVES["dpo"].fn, **given)


def test_tokens_that_do_not_fit():
    with pytest.raises(ValueError, match="at most 2"):
        evaluate_tokens(TOKEN_OBJECTIVES["apa_pairs"][0], LOGPS, OFFSETS, parameters=(1.0,) * 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("kto", {}, id="coupled"),
        pytest.param("daa", {"g": (torch.neg, torch.ones_like)}, id="callable"),
    ],
)
def test_objectives_without_a_jitted_formula(name, options):
    with pytest.raises(ValueError, match="jitted formula"):
        Batch().evaluate(Objective.parse(name, **options))


def test_a_token_objective_needs_its_reference():
    with pytest.raises(ValueError, match="ref_token_logps: expected"):
        Batch().evaluate(Objective.parse("apa"), ref_token_logps=None)
