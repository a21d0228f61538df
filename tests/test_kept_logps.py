"""Log-probs whose gradients of logits are kept: 3U for any loss that follows, and the right one."""

from __future__ import annotations

import pytest
import torch
from device_memory import META, counted
from kept_calls import OneSign

from fastdaa import LmHead, token_logps
from fastdaa.kept_logps import plan_kept
from fastdaa.logps import head_logps_and_stats

# What the interpreter's numpy says about masked -inf - -inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

N, V, D = 21, 131, 24
EVERYTHING = {"softcap": 3.0, "logit_scale": 1.4, "temperature": 0.7}


def leaves(dtype=torch.float32, bias=False):
    made = [torch.randn(N, D), torch.randn(V, D) * 0.6, torch.randn(V) if bias else None]
    return [None if t is None else t.to(dtype).requires_grad_() for t in made]


TARGETS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))


def coupled(logps):
    """A loss in which every token's coefficient depends on all log-probs."""
    return (logps.sort().values * torch.linspace(-1, 1, N, dtype=logps.dtype)).exp().sum().log()


def values_and_gradients(tensors, loss=coupled, options=None, **call):
    copies = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    hidden, weight, bias = copies
    logps = token_logps(hidden, weight, TARGETS, bias=bias, **(options or {}), **call)
    wanted = [t for t in copies if t is not None]
    return logps.detach(), torch.autograd.grad(loss(logps), wanted)


@pytest.mark.parametrize(
    ("options", "bias", "engine"),
    [
        pytest.param({}, False, "auto", id="plain"),
        pytest.param(EVERYTHING, True, "auto", id="everything"),
        pytest.param(EVERYTHING, True, "triton", id="triton", marks=pytest.mark.interpreter),
    ],
)
def test_values_are_those_of_recompute_and_gradients_those_of_autograd(options, bias, engine):
    tensors = leaves(bias=bias)
    kept, grads = values_and_gradients(tensors, options=options, impl="single_pass", engine=engine)
    again, _ = values_and_gradients(tensors, options=options, impl="recompute", engine=engine)
    assert torch.equal(kept, again)
    wide = [None if t is None else t.double() for t in tensors]
    _, wanted = values_and_gradients(wide, options=options, impl="reference")
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_gradcheck_in_fp64():
    hidden, weight, bias = leaves(torch.float64, bias=True)

    def loss(*tensors):
        rows, head = tensors[0], LmHead(*tensors[1:], **EVERYTHING)
        return coupled(head_logps_and_stats(rows, head, TARGETS, impl="single_pass")[0])

    # Fast mode: against random directions.
    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), fast_mode=True)


def test_bf16_factors_round_no_more_than_materialised_logits(half_factors):
    tensors = leaves(torch.bfloat16, bias=True)
    wide = [t.detach().double() for t in tensors]
    _, wanted = values_and_gradients(wide, impl="reference")
    half_factors(torch.bfloat16)
    _, grads = values_and_gradients(tensors, impl="single_pass")
    for leaf, got, want in zip(tensors, grads, wanted, strict=True):
        assert got.dtype == leaf.dtype
        assert (got.double() - want).norm() < 2 * torch.finfo(leaf.dtype).eps * want.norm()


@pytest.mark.parametrize("mean", [1, 3])
def test_targets_that_cancel_the_others_under_wide_factors(mean):
    """On a CPU: the weight's gradient is rounded, the factors of its product are not."""
    problem = OneSign(mean)
    problem.check(problem.gradients(lambda *call: token_logps(*call, impl="single_pass")))


@pytest.mark.parametrize(
    ("v", "d", "coefficient", "materialised", "single_pass", "recompute"),
    [
        (4, 8, 1.5, 1.9e-3, 1.9e-3, 1.9e-3),
        (250, 16, 0.37, 5.1e-3, 1.7e-3, 2.9e-3),
        (2000, 16, 0.37, 3.9e-3, 1.5e-3, 3.3e-3),
    ],
    ids=str,
)
def test_one_feature_that_all_tokens_share(
    half_factors, v, d, coefficient, materialised, single_pass, recompute
):
    """The numbers of docs/head.md: to the nearest, ``c * H`` would be off by the same for all."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, d, generator=generator)
    hidden[:, 0] = 30.3
    hidden, targets = hidden.bfloat16(), torch.randint(v, (2048,), generator=generator)

    def by_weight(logps_of, dtype=torch.bfloat16):
        weight = torch.zeros(v, d, dtype=dtype, requires_grad=True)
        logps = logps_of(hidden.to(dtype), weight)
        return torch.autograd.grad(coefficient * logps.sum(), weight)[0].double()

    def exact(hidden, weight):
        return torch.log_softmax(hidden @ weight.T, 1).gather(1, targets[:, None])

    def usual(hidden, weight):
        return torch.log_softmax((hidden @ weight.T).float(), 1).gather(1, targets[:, None])

    truth = by_weight(exact, torch.float64)
    found = [by_weight(usual)]
    half_factors(torch.bfloat16)
    for impl in ("single_pass", "recompute"):
        found.append(by_weight(lambda *call, impl=impl: token_logps(*call, targets, impl=impl)))
    errors = [((got - truth).norm() / truth.norm()).item() for got in found]
    assert errors == pytest.approx([materialised, single_pass, recompute], rel=0.06)


@pytest.mark.parametrize("keep", [False, True], ids=["asked-for", "preferred"])
def test_no_tokens_have_a_gradient_of_0(half_factors, keep):
    half_factors(torch.bfloat16)
    hidden, weight, _ = leaves(torch.bfloat16)
    call = {"keep": True} if keep else {"impl": "single_pass"}
    logps, _ = head_logps_and_stats(hidden[:0], LmHead(weight), TARGETS[:0], **call)
    logps.sum().backward()
    assert logps.shape == (0,) and not weight.grad.any() and not hidden.grad.any()


@pytest.mark.parametrize("scored", [0, 1, 5, 15], ids=lambda n: f"{n}-of-{N}")
def test_tokens_without_a_coefficient_are_left_out(scored):
    tensors = leaves(bias=True)

    def loss(logps):
        return logps[torch.randperm(N, generator=torch.Generator().manual_seed(2))[:scored]].sum()

    _, grads = values_and_gradients(tensors, loss, impl="single_pass")
    _, wanted = values_and_gradients(tensors, loss, impl="reference")
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("few", [False, True], ids=["all", "few"])
def test_backward_runs_again(few):
    hidden, weight, _ = leaves()
    logps = token_logps(hidden, weight, TARGETS, impl="single_pass")
    loss = logps[:3].sum() if few else coupled(logps)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("trained", [(True, False), (False, True)], ids=["hidden", "head"])
def test_one_gradient_alone(trained):
    tensors = [
        t.detach().requires_grad_(want) for t, want in zip(leaves()[:2], trained, strict=True)
    ]
    coupled(token_logps(*tensors, TARGETS, impl="single_pass")).backward()
    wanted = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    coupled(token_logps(*wanted, TARGETS, impl="reference")).backward()
    for got, want in zip(tensors, wanted, strict=True):
        assert (got.grad is None) == (want.grad is None)
        if got.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_recompute():
    hidden, weight, _ = leaves()
    kept, again = (
        head_logps_and_stats(hidden, LmHead(weight), TARGETS, stats=True, impl=impl)[1]
        for impl in ("single_pass", "recompute")
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert not any(t.requires_grad for t in kept)


@pytest.mark.parametrize(
    ("dtype", "engine", "tokens", "units"),
    [
        pytest.param(torch.bfloat16, "torch", 8192, 3, id="bf16"),
        pytest.param(torch.bfloat16, "triton", 8192, 3, id="bf16-triton"),
        pytest.param(torch.bfloat16, "torch", 8448, 3 + 18432 / 128256, id="bf16-a-few-too-many"),
        pytest.param(torch.bfloat16, "triton", 1 << 17, 4, id="bf16-too-many"),
        pytest.param(torch.float32, "triton", 1024, 3, id="fp32"),
        pytest.param(torch.float16, "torch", 1024, 4, id="fp16"),
    ],
)
def test_products_and_memory_on_a_gpu(dtype, engine, tokens, units):
    """Preferred, it is taken where enough of it fits, and holds no more than its plan says."""
    v, d = 128256, 512
    with counted() as held:
        hidden = torch.empty(tokens, d, dtype=dtype, device=META, requires_grad=True)
        weight = torch.empty(v, d, dtype=dtype, device=META, requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.int64, device=META)
        plan = plan_kept(hidden, LmHead(weight), engine=engine)
        assert (plan is not None) == (units < 4)
        held.restart()
        logps, _ = head_logps_and_stats(hidden, LmHead(weight), targets, engine=engine, keep=True)
        logps.sum().backward()
        inputs = (hidden, weight, targets, hidden.grad, weight.grad)
        extra = held.peak(list(inputs))
    assert held.flop == pytest.approx(units * 2 * tokens * v * d, rel=1e-12)
    if plan is not None:
        # Beside it are a few numbers a token.
        assert 0.5 * plan.extra_bytes < extra <= plan.extra_bytes + 256 * tokens


def test_preferring_it_changes_no_other_path():
    hidden, weight, _ = leaves()
    head, frozen = LmHead(weight), LmHead(weight.detach())
    with torch.no_grad():
        assert plan_kept(hidden, head) is None
    assert plan_kept(hidden, frozen) is None
    assert plan_kept(hidden, head, max_bytes=8 * V) is None
    logps, _ = head_logps_and_stats(hidden, frozen, TARGETS, keep=True)
    assert type(logps.grad_fn).__name__ == "FrozenBackward"
    logps, _ = head_logps_and_stats(hidden, head, TARGETS, keep=True, max_bytes=8 * V)
    assert type(logps.grad_fn).__name__ == "RecomputeBackward"
    logps, _ = head_logps_and_stats(hidden, head, TARGETS)
    assert type(logps.grad_fn).__name__ == "RecomputeBackward"
    logps, _ = head_logps_and_stats(hidden[:0], head, TARGETS[:0], keep=True)
    logps.sum().backward()
    assert not weight.grad.any()
