"""``token_kl`` against the KL divergence of materialised logits in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from fastdaa import LmHead, reference, token_divergence, token_kl
from fastdaa.divergence import KINDS
from fastdaa.kernels import divergence as divergence_kernel


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


def test_gradient_follows_grad_mode_and_never_reaches_the_reference():
    hidden, head, ref_hidden, ref_head = heads()
    assert not token_kl(hidden, head, ref_hidden.requires_grad_(), ref_head).requires_grad
    assert token_kl(hidden.requires_grad_(), head, ref_hidden, ref_head).requires_grad
    with torch.no_grad():
        assert not token_kl(hidden, head, ref_hidden, ref_head).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({2: torch.zeros(3, 24)}, "expected 21 positions .* got 3", id="positions"),
        pytest.param({3: LmHead(torch.zeros(5, 24))}, "a vocabulary of 97, got 5", id="vocabulary"),
        pytest.param({3: LmHead(torch.zeros(97, 9))}, r"weight: expected shape", id="ref-width"),
        pytest.param({0: torch.zeros(21, 5)}, r"weight: expected shape", id="policy-width"),
        pytest.param(
            {2: torch.zeros(21, 24).to("meta"), 3: LmHead(torch.zeros(97, 24).to("meta"))},
            "ref_hidden_states: expected device cpu, got meta",
            id="reference-elsewhere",
        ),
    ],
)
def test_wrong_arguments(change, message):
    made = [change.get(i, x) for i, x in enumerate(heads())]
    with pytest.raises(ValueError, match=message):
        token_kl(*made)


def oracle(kind, z, ref_z):
    """The definitions, with everything materialised."""
    p, q = z.log_softmax(-1), ref_z.log_softmax(-1)
    mean = torch.logaddexp(p, q) - math.log(2.0)
    forward, backward = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    js = ((p.exp() * (p - mean)).sum(-1) + (q.exp() * (q - mean)).sum(-1)) / 2
    return {"kl": forward, "reverse_kl": backward, "js": js}[kind]


GRADIENT_CASES = [
    pytest.param({}, True, id="trained-head"),
    pytest.param({}, False, id="frozen-head"),
    pytest.param({"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.5}, True, id="options"),
    pytest.param({"softcap": 3.0, "logit_scale": 0.7}, False, id="options-frozen"),
    pytest.param({"bias": torch.linspace(-1, 1, 97).double()}, True, id="bias"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "trained"), GRADIENT_CASES)
def test_gradients_are_those_of_materialised_logits(kind, options, trained):
    hidden, head, ref_hidden, ref_head = heads(dtype=torch.float64, **options)
    tensors = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    wanted = [t.requires_grad_() for t in (tensors if trained else tensors[:1])]
    cotangent = torch.randn(hidden.shape[0], dtype=torch.float64)

    def grads(values):
        return torch.autograd.grad((values * cotangent).sum(), wanted)

    want = oracle(
        kind, logits(hidden, head, torch.float64), logits(ref_hidden, ref_head, torch.float64)
    )
    # A budget of four rows: several blocks add up to one gradient.
    got = token_divergence(hidden, head, ref_hidden, ref_head, kind=kind, max_bytes=4 * 97 * 4)
    assert torch.allclose(got, want, atol=1e-12)
    for a, b in zip(grads(got), grads(want), strict=True):
        assert torch.allclose(a, b, atol=1e-11), (a - b).abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    hidden, head, ref_hidden, ref_head = heads(n=3, v=11, dtype=torch.float64)
    weight = head.weight.requires_grad_()

    def values(h, w):
        return token_divergence(h, LmHead(w, softcap=5.0), ref_hidden, ref_head, kind=kind)

    assert torch.autograd.gradcheck(values, (hidden.requires_grad_(), weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_gradients_in_half_precision_keep_their_dtype_and_size(dtype, trained):
    hidden, head, ref_hidden, ref_head = heads(dtype=dtype)
    wanted = [hidden.requires_grad_()] + ([head.weight.requires_grad_()] if trained else [])
    scale = 1e-4  # below what fp16 gradients of small probabilities survive unscaled
    got = token_divergence(hidden, head, ref_hidden, ref_head)
    grads = torch.autograd.grad((got * scale).sum(), wanted)
    wide = [t.detach().double().requires_grad_() for t in (hidden, head.weight)]
    z = wide[0] @ wide[1].T
    want = oracle("kl", z, logits(ref_hidden, ref_head, torch.float64))
    for a, b in zip(grads, torch.autograd.grad((want * scale).sum(), wide), strict=False):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < 2e-2


def test_tokens_that_both_exclude_cost_nothing_and_have_no_gradient():
    hidden, head, ref_hidden, ref_head = heads(dtype=torch.float64)
    out = torch.zeros(97, dtype=torch.float64)
    out[5] = -torch.inf
    policy, ref = LmHead(head.weight, bias=out), LmHead(ref_head.weight, bias=out)
    hidden.requires_grad_()
    for kind in KINDS:
        values = token_divergence(hidden, policy, ref_hidden, ref, kind=kind)
        (grad,) = torch.autograd.grad(values.sum(), hidden)
        assert values.isfinite().all() and grad.isfinite().all(), kind
    only_ref = token_divergence(hidden, head, ref_hidden, ref)
    assert torch.isinf(only_ref).all()
    assert token_divergence(hidden, head, ref_hidden, ref, kind="js").isfinite().all()


# What the interpreter's numpy says about masked -inf - -inf.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.interpreter
def test_the_fused_kernel_gives_the_same_values_and_no_gradient():
    hidden, head, ref_hidden, ref_head = heads(n=5, v=37)
    for kind in KINDS:
        want = token_divergence(hidden, head, ref_hidden, ref_head, kind=kind)
        got = token_divergence(hidden, head, ref_hidden, ref_head, kind=kind, engine="fused")
        assert torch.allclose(got, want, atol=1e-4), kind
    with pytest.raises(ValueError, match="a call without gradient"):
        token_divergence(hidden.requires_grad_(), head, ref_hidden, ref_head, engine="fused")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.interpreter
def test_the_first_fused_call_of_a_kind_is_held_to_plain_torch(fused_variants, monkeypatch):
    tensors = heads(n=5, v=37)
    token_divergence(*tensors, kind="kl", engine="fused")
    token_divergence(*tensors, kind="reverse_kl", engine="fused")
    assert len(fused_variants) == 1  # one kernel for both
    right = divergence_kernel.token_divergences
    monkeypatch.setattr(
        divergence_kernel, "token_divergences",
        lambda *a, **k: (found := right(*a, **k))._replace(js=found.js + 0.1),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"expected divergences .* off by up to 0\.1 on a GPU"):
        token_divergence(*tensors, kind="js", engine="fused")


def test_backward_twice_and_unknown_kind():
    hidden, head, ref_hidden, ref_head = heads()
    hidden.requires_grad_()
    value = token_divergence(hidden, head, ref_hidden, ref_head).sum()
    first = torch.autograd.grad(value, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, hidden)[0])
    with pytest.raises(ValueError, match="kind: expected one of 'kl'"):
        token_divergence(hidden, head, ref_hidden, ref_head, kind="tv")


@pytest.mark.parametrize("changed", ["hidden_states", "weight", "bias"])
def test_a_reference_that_changes_before_the_backward_pass_raises(changed):
    hidden, head, ref_hidden, ref_head = heads()
    ref_head = LmHead(ref_head.weight, torch.zeros(97))
    hidden.requires_grad_()
    head.weight.requires_grad_()
    value = token_divergence(hidden, head, ref_hidden, ref_head).sum()
    {"hidden_states": ref_hidden, "weight": ref_head.weight, "bias": ref_head.bias}[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("trained", [True, False])
def test_all_that_waits_for_the_backward_pass_can_be_offloaded(trained):
    hidden, head, ref_hidden, ref_head = heads()
    hidden.requires_grad_()
    head.weight.requires_grad_(trained)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_divergence(hidden, head, ref_hidden, ref_head)
    shapes = {tuple(t.shape) for t in kept}
    both = {(21, 16), (97, 16), (21, 24), (97, 24)}
    assert shapes == (both if trained else {(21, 16), (21,)})


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js"])
@pytest.mark.parametrize("made", ["hidden states", "weight"])
def test_a_reference_may_come_from_inference_mode(kind, made):
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    ref_hidden, ref_weight = torch.randn(6, 8), torch.randn(11, 8)

    def gradients(ref_hidden, ref_weight):
        values = token_divergence(hidden, LmHead(weight), ref_hidden, LmHead(ref_weight), kind=kind)
        return torch.autograd.grad(values.sum(), (hidden, weight))

    want = gradients(ref_hidden, ref_weight)
    with torch.inference_mode():
        if made == "weight":
            ref_weight = ref_weight.clone()
        else:
            ref_hidden = ref_hidden.clone()
    for got, expected in zip(gradients(ref_hidden, ref_weight), want, strict=True):
        assert torch.equal(got, expected)
