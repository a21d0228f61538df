"""``token_kl`` against the KL divergence of materialised logits in fp64."""

from __future__ import annotations

import pytest
import torch

from fastdaa import LmHead, reference, token_kl


def heads(n=21, v=97, dtype=torch.float32, ref_dtype=None, **options):
    policy = torch.randn(n, 16).to(dtype), LmHead(torch.randn(v, 16).to(dtype), **options)
    ref_dtype = ref_dtype or dtype
    ref = torch.randn(n, 24).to(ref_dtype), LmHead((torch.randn(v, 24) * 0.5).to(ref_dtype))
    return *policy, *ref


def logits(hidden, head, dtype):
    bias = None if head.bias is None else head.bias.to(dtype)
    options = {"softcap": head.softcap, "logit_scale": head.logit_scale}
    return reference.logits(
        hidden.to(dtype), head.weight.to(dtype), bias=bias, temperature=head.temperature, **options
    )


def kl(hidden, head, ref_hidden, ref_head, dtype):
    return reference.kl_divergence(logits(hidden, head, dtype), logits(ref_hidden, ref_head, dtype))


@pytest.mark.parametrize(
    ("kwargs", "max_bytes"),
    [
        pytest.param({}, None, id="fp32"),
        pytest.param({}, 4 * 97 * 4, id="many-blocks"),
        pytest.param({"v": 9001}, None, id="large-vocabulary"),
        pytest.param({"dtype": torch.bfloat16}, None, id="bf16"),
        pytest.param({"dtype": torch.float64}, None, id="fp64"),
        pytest.param(
            {"dtype": torch.bfloat16, "ref_dtype": torch.float32}, None, id="bf16-against-fp32"
        ),
        pytest.param(
            {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.5}, None, id="head-options"
        ),
        pytest.param({"n": 1, "v": 2}, None, id="smallest"),
        pytest.param({"n": 0}, None, id="no-token"),
    ],
)
def test_as_accurate_as_plain_torch(within_budget, kwargs, max_bytes):
    made = heads(**kwargs)
    wide = torch.promote_types(made[0].dtype, torch.float32)
    got = token_kl(*made, max_bytes=max_bytes)
    within_budget("kl", got, kl(*made, wide), kl(*made, torch.float64), made[1].vocab_size)
    assert (got > -1e-6).all()


def test_equal_models_have_a_divergence_of_zero():
    hidden, head, *_ = heads()
    assert token_kl(hidden, head, hidden.clone(), head).abs().max() < 1e-6


def test_kl_of_the_policy_against_the_reference_and_not_the_other_way():
    policy, ref = LmHead(torch.tensor([[0.0], [-20.0]])), LmHead(torch.zeros(2, 1))
    one = torch.ones(1, 1)
    torch.testing.assert_close(token_kl(one, policy, one, ref), torch.tensor([2.0]).log())
    assert token_kl(one, ref, one, policy).item() == pytest.approx(10 - torch.log(torch.tensor(2)))


def test_tokens_that_a_side_excludes():
    some = LmHead(torch.tensor([[0.0], [0.0], [-torch.inf]]))
    all_three = LmHead(torch.zeros(3, 1))
    one = torch.ones(1, 1)
    torch.testing.assert_close(token_kl(one, some, one, all_three), torch.tensor([1.5]).log())
    assert token_kl(one, all_three, one, some).item() == torch.inf
    assert token_kl(one, some, one, some).item() == 0.0


def test_a_large_common_offset_is_harmless():
    hidden, head, ref_hidden, ref_head = heads()
    shifted = LmHead(head.weight, bias=torch.full((97,), 4096.0))
    expected = token_kl(hidden, head, ref_hidden, ref_head)
    got = token_kl(hidden, shifted, ref_hidden, ref_head)
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3)


def test_no_gradient():
    hidden, head, *ref = heads()
    assert not token_kl(hidden.requires_grad_(), head, *ref).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({2: torch.zeros(3, 24)}, "expected 21 positions .* got 3", id="positions"),
        pytest.param({3: LmHead(torch.zeros(5, 24))}, "a vocabulary of 97, got 5", id="vocabulary"),
        pytest.param({3: LmHead(torch.zeros(97, 9))}, r"weight: expected shape", id="ref-width"),
        pytest.param({0: torch.zeros(21, 5)}, r"weight: expected shape", id="policy-width"),
    ],
)
def test_wrong_arguments(change, message):
    made = [change.get(i, x) for i, x in enumerate(heads())]
    with pytest.raises(ValueError, match=message):
        token_kl(*made)
