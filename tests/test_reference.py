"""The oracle itself: numbers worked by hand, derivatives by finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from fastdaa import reference

# Two tokens over a vocabulary of three: logits (1, 2, 3) and (0, 0, ln 2).
HIDDEN = torch.tensor([[1.0, 0.0], [0.0, math.log(2.0)]], dtype=torch.float64)
WEIGHT = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
TARGETS = torch.tensor([2, 0])
LOG_Z = math.log(math.e + math.e**2 + math.e**3)


def close(got, expected) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=0, atol=1e-14)


def test_logits_by_hand():
    close(reference.logits(HIDDEN, WEIGHT), [[1.0, 2.0, 3.0], [0.0, 0.0, math.log(2.0)]])


def test_logits_apply_bias_then_scale_then_cap_then_temperature():
    z = reference.logits(
        HIDDEN[:1], WEIGHT, bias=torch.tensor([1.0, 0.0, -1.0]).double(),
        softcap=2.0, logit_scale=0.5, temperature=4.0,
    )  # fmt: skip
    # (1 + 1, 2 + 0, 3 - 1) * 0.5 = (1, 1, 1); 2 tanh(1 / 2) / 4.
    close(z, [[math.tanh(0.5) / 2] * 3])


def test_token_logps_by_hand():
    # The second row has weights 1, 1, 2: the first token has probability 1/4.
    close(reference.token_logps(HIDDEN, WEIGHT, TARGETS), [3.0 - LOG_Z, -math.log(4.0)])


def test_token_stats_by_hand():
    stats = reference.token_stats(HIDDEN, WEIGHT, TARGETS)
    p = [math.exp(z - LOG_Z) for z in (1.0, 2.0, 3.0)]
    close(stats.entropy, [-sum(x * math.log(x) for x in p), 1.5 * math.log(2.0)])
    close(stats.top1, [1.0, 0.0])
    close(stats.mean_logit, [2.0, math.log(2.0) / 3])
    close(stats.log_sum_sq, [math.log(sum(x * x for x in p)), math.log(3 / 8)])


def test_a_tie_for_the_first_place_is_a_hit():
    stats = reference.token_stats(torch.ones(1, 1), torch.ones(4, 1), torch.tensor([3]))
    assert stats.top1.tolist() == [1.0]


def test_entropy_counts_excluded_tokens_as_zero():
    weight = torch.tensor([[0.0], [0.0], [-math.inf]])
    stats = reference.token_stats(torch.ones(1, 1), weight, torch.tensor([0]))
    torch.testing.assert_close(stats.entropy, torch.tensor([math.log(2.0)]))


def test_sequence_logps_with_empty_sequences():
    sums = reference.sequence_logps(torch.tensor([1.0, 2.0, 4.0]), [0, 2, 0, 1])
    assert sums.tolist() == [0.0, 3.0, 0.0, 4.0]


def test_kl_by_hand():
    policy = torch.log(torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64))
    ref = torch.log(torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]], dtype=torch.float64))
    close(reference.kl_divergence(policy, ref), [math.log(2.0), 0.0])


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        pytest.param((torch.bfloat16, torch.bfloat16), torch.float32, id="bf16"),
        pytest.param((torch.float16, torch.float32), torch.float32, id="fp16-and-fp32"),
        pytest.param((torch.float32, torch.float64), torch.float64, id="fp32-and-fp64"),
    ],
)
def test_logits_are_wide(inputs, expected):
    hidden, weight = (t.to(dtype) for t, dtype in zip((HIDDEN, WEIGHT), inputs, strict=True))
    assert reference.token_logps(hidden, weight, TARGETS).dtype == expected


def test_gradients_by_finite_differences():
    hidden, weight = torch.randn(4, 3).double(), torch.randn(6, 3).double()
    bias, targets = torch.randn(6).double(), torch.tensor([5, 0, 3, 3])
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]

    def logps(hidden, weight, bias):
        return reference.token_logps(
            hidden, weight, targets, bias=bias, softcap=1.5, logit_scale=1.3, temperature=0.7
        )

    assert torch.autograd.gradcheck(logps, inputs)
