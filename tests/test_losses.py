"""Every pair loss: gradcheck, precision, limits and edge cases."""

from __future__ import annotations

import math

import pytest
import torch

from fastdaa.losses import LOSSES, get_loss
from fastdaa.outputs import BatchTotals, PairLogps

PAIR_LOSSES = [name for name, loss in LOSSES.items() if loss.level == "pair"]
LENGTHS = (torch.tensor([5, 12, 3, 20]), torch.tensor([7, 9, 4, 11]))


def pairs(chosen, rejected, lengths=LENGTHS, dtype=torch.float64, grad=False) -> PairLogps:
    chosen = torch.as_tensor(chosen, dtype=dtype).clone().requires_grad_(grad)
    rejected = torch.as_tensor(rejected, dtype=dtype).clone().requires_grad_(grad)
    return PairLogps(chosen, rejected, *lengths)


def example(dtype=torch.float64, grad=True) -> tuple[PairLogps, PairLogps]:
    """Log-ratios a = (1.5, -4, -0.7, 2.25), b = (-3, 0.5, -1.1, 1.25); their mean is negative."""
    ref = pairs([-12.5, -30.0, -6.5, -55.25], [-15.0, -22.5, -9.4, -31.25], dtype=dtype)
    policy = pairs(
        [-11.0, -34.0, -7.2, -53.0], [-18.0, -22.0, -10.5, -30.0], dtype=dtype, grad=grad
    )
    return policy, ref


def gradients(name, policy, ref, **kwargs):
    losses = get_loss(name).fn(policy, ref, **kwargs)
    inputs = (policy.chosen, policy.rejected)
    # Likelihood terms do not read the rejected side: materialize_grads makes that a zero.
    return losses.detach(), torch.autograd.grad(losses.sum(), inputs, materialize_grads=True)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradcheck_in_fp64(name):
    policy, ref = example()
    loss = get_loss(name)

    def losses(chosen, rejected):
        return loss.fn(PairLogps(chosen, rejected, *LENGTHS), ref)

    assert torch.autograd.gradcheck(losses, (policy.chosen, policy.rejected))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_fp32_agrees_with_fp64_and_keeps_its_dtype(name):
    wide = gradients(name, *example(torch.float64))
    narrow = gradients(name, *example(torch.float32))
    assert wide[0].dtype == torch.float64
    assert narrow[0].dtype == torch.float32
    torch.testing.assert_close(narrow[0].double(), wide[0], rtol=2e-6, atol=1e-6)
    for got, want in zip(narrow[1], wide[1], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    "alias", ["dpo", "sigmoid_norm", "rdpo-even", "cdpo", "aot", "aot_unpaired"]
)
def test_identical_policy_and_reference_give_exactly_ln2(alias, dtype):
    name, kwargs = ("dpo", {"length_alpha": 0.3}) if alias == "rdpo-even" else (alias, {})
    even = (torch.tensor([3, 9, 1, 4]),) * 2
    policy = pairs([-1.1, -33.3, -0.7, -5e3], [-2.3, -17.9, -1e-3, -4e4], even, dtype)
    losses = get_loss(name).fn(policy, policy, **kwargs)
    ln2 = torch.full((4,), math.log(2), dtype=dtype)
    if alias == "cdpo":
        torch.testing.assert_close(losses, ln2)
    else:
        assert torch.equal(losses, ln2)


def test_zero_length_alpha_is_dpo_to_the_bit():
    policy, ref = example()
    plain = gradients("dpo", policy, ref)
    zero = gradients("dpo", policy, ref, length_alpha=0.0)
    assert torch.equal(plain[0], zero[0])
    assert all(torch.equal(p, z) for p, z in zip(plain[1], zero[1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_huge_margins_stay_finite(name, dtype):
    sizes = torch.tensor([1e4, -1e4, 1e6, -1e6], dtype=dtype)
    ref = pairs(-2e6 * torch.ones(4), -2e6 * torch.ones(4), dtype=dtype)
    policy = pairs(ref.chosen + sizes / 2, ref.rejected - sizes / 2, dtype=dtype, grad=True)
    kwargs = {"beta": 1.0} if "beta" in LOSSES[name].hyperparameters else {}
    losses, grads = gradients(name, policy, ref, **kwargs)
    assert losses.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_exponential_keeps_pulling_beyond_its_limit():
    policy = pairs([-100.0, -20.0, 0.0, 0.0], [0.0] * 4, grad=True)
    ref = pairs([0.0] * 4, [0.0] * 4)
    losses, (grad, _) = gradients("exponential", policy, ref, beta=1.0)
    assert losses[0].item() == pytest.approx(math.exp(30) * 71)
    assert grad[0].item() == pytest.approx(-math.exp(30))
    assert losses[1].item() == pytest.approx(math.exp(20))


@pytest.mark.parametrize(
    ("kind", "alpha"), [("forward_kl", 0.5), ("alpha_divergence", 0.0), ("alpha_divergence", 2.0)]
)
def test_powers_of_f_dpo_keep_pulling_beyond_their_limit(kind, alpha):
    sign = 1.0 if alpha == 2.0 else -1.0  # the side on which the power is large
    policy = pairs([sign * 100.0, 20.0, 0.0, 0.0], [0.0] * 4, dtype=torch.float32, grad=True)
    ref = pairs([0.0] * 4, [0.0] * 4, dtype=torch.float32)
    kwargs = {"f_divergence_type": kind, "f_alpha_divergence_coef": alpha}
    losses, (grad, _) = gradients("f_dpo", policy, ref, beta=1e-13, **kwargs)
    x = sign * 1e-13 * (math.exp(30) * 71 - 1)
    assert losses[0].item() == pytest.approx(math.log1p(math.exp(-x)), rel=1e-6)
    pull = 1 / (1 + math.exp(x))
    assert grad[0].item() == pytest.approx(-1e-13 * math.exp(30) * pull, rel=1e-5)


@pytest.mark.parametrize("alpha", [1 - 1e-5, 1 + 1e-4, 0.999], ids=str)
def test_f_dpo_near_the_reverse_kl_keeps_its_digits(alpha):
    """Both powers are nearly 1 there."""
    kwargs = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    found = []
    for dtype in (torch.float32, torch.float64):
        policy = pairs([1.7, -0.3, 25.0, 0.1], [0.2, 0.4, -3.0, 0.1], dtype=dtype, grad=True)
        ref = pairs([0.0] * 4, [0.0] * 4, dtype=dtype)
        losses, grads = gradients("f_dpo", policy, ref, beta=0.5, **kwargs)
        found.append([values.double() for values in (losses, *grads)])
    torch.testing.assert_close(*found, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    "name", ["dpo", "exponential", "slic", "savage", "truncated_quadratic", "discopop"]
)
def test_a_completion_that_the_reference_excludes_costs_nothing(name):
    """The margin is infinite."""
    policy = pairs([-5.0, -4.0], [-6.0, -7.0], dtype=torch.float32, grad=True)
    ref = pairs([-torch.inf, -4.0], [-6.0, -7.0], dtype=torch.float32)
    losses, grads = gradients(name, policy, ref)
    assert losses[0] == 0 and losses[1] > 0
    assert all(g[0] == 0 and g.isfinite().all() for g in grads)


def test_hinge_has_no_gradient_at_and_beyond_its_kink():
    ref = pairs([0.0] * 4, [0.0] * 4)
    policy = pairs([1.0, 2.0, 0.5, 1.5], [-1.0, -1.0, -1.0, -0.5], grad=True)
    losses, (grad, _) = gradients("slic", policy, ref, beta=0.5)  # beta h = 1, 1.5, 0.75, 1
    assert losses.tolist() == [0.0, 0.0, 0.25, 0.0]
    assert grad.tolist() == [0.0, 0.0, -0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", [*PAIR_LOSSES, "sigmoid_norm", "ipo_norm", "rdpo"])
def test_empty_completions_stay_finite(name, dtype):
    lengths = (torch.tensor([0, 0, 4, 0]), torch.tensor([0, 3, 0, 0]))
    policy = pairs([0.0, 0.0, -5.0, 0.0], [0.0, -3.0, 0.0, 0.0], lengths, dtype, grad=True)
    ref = pairs([0.0, 0.0, -4.0, 0.0], [0.0, -3.5, 0.0, 0.0], lengths, dtype)
    losses, grads = gradients(name, policy, ref)
    assert losses.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_a_batch_of_only_empty_chosen_completions_has_no_likelihood():
    empty = (torch.zeros(4, dtype=torch.int64),) * 2
    policy = pairs([0.0] * 4, [0.0] * 4, empty)
    assert get_loss("sft").fn(policy, None).tolist() == [0.0] * 4
    assert get_loss("sft").fn(policy, None, totals=BatchTotals(4, 0)).tolist() == [0.0] * 4


def test_the_table_names_near_losses():
    with pytest.raises(KeyError, match="did you mean 'dpo'"):
        LOSSES["dop"]
    with pytest.raises(KeyError, match="alias"):
        LOSSES["sigmoid"]
    assert LOSSES.get("dop") is None and "dop" not in LOSSES
