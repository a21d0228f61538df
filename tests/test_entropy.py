"""``token_entropy`` against the entropy of materialised logits: values, gradients, cost, memory."""

from __future__ import annotations

import math

import pytest
import torch
from device_memory import META, HeldBytes, counted

from fastdaa import LmHead, reference, token_entropy, token_stats
from fastdaa.plan_call import plan_call

V, D = 97, 16
OPTIONS = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.5}
TWO_BLOCKS = 4 * V * 24


def problem(n=37, dtype=torch.float32, bias=False):
    made = [torch.randn(n, D), torch.randn(V, D), torch.randn(V) if bias else None]
    return [None if t is None else t.to(dtype) for t in made]


def oracle(hidden, weight, bias=None, **options):
    logps = reference.logits(hidden, weight, bias=bias, **options).log_softmax(dim=1)
    return -(logps.exp() * logps.clamp(min=-1e4)).sum(dim=1)


def gradients(call, leaves, trained, coefficients, **options):
    leaves = [None if t is None else t.detach().clone() for t in leaves]
    wanted = [t for t in leaves[: 3 if trained else 1] if t is not None]
    for t in wanted:
        t.requires_grad_()
    value = call(leaves[0], leaves[1], bias=leaves[2], **options)
    grads = torch.autograd.grad(value, wanted, coefficients.to(value.dtype))
    return value.detach(), [g.double() for g in grads]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("max_bytes", [None, TWO_BLOCKS], ids=["whole", "chunks"])
@pytest.mark.parametrize(
    ("engine", "options", "bias"),
    [
        pytest.param("torch", {}, False, id="plain"),
        pytest.param("torch", OPTIONS, True, id="everything"),
        pytest.param("triton", {}, False, id="triton"),
        pytest.param("triton", OPTIONS, True, id="triton-everything"),
    ],
)
def test_values_and_gradients_are_those_of_materialised_logits(
    engine, options, bias, max_bytes, trained
):
    leaves, coefficients = problem(bias=bias), torch.randn(37).double()
    coefficients[::3] = 0.0
    wide = [None if t is None else t.double() for t in leaves]
    want, by = gradients(oracle, wide, trained, coefficients, **options)
    got, ours = gradients(
        token_entropy, leaves, trained, coefficients, engine=engine, max_bytes=max_bytes, **options
    )
    assert got.dtype == torch.float32 and len(ours) == (1 + trained * (1 + bias))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)
    for a, b in zip(ours, by, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("max_bytes", [None, 8 * 7 * 16], ids=["whole", "chunks"])
def test_gradcheck(trained, max_bytes):
    hidden, weight, bias = (torch.randn(*s).double() for s in ((20, 3), (7, 3), (7,)))
    leaves = [hidden.requires_grad_()]
    if trained:
        leaves += [weight.requires_grad_(), bias.requires_grad_()]

    def call(*_: torch.Tensor) -> torch.Tensor:
        return token_entropy(hidden, weight, bias=bias, max_bytes=max_bytes, **OPTIONS)

    assert torch.autograd.gradcheck(call, leaves)


def test_by_hand():
    one = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3.0)]])  # probabilities 1/4 and 3/4
    value = token_entropy(one, weight)
    assert value.item() == pytest.approx(math.log(4) - 0.75 * math.log(3))
    value.backward()
    # -p (log p + H) at both, times the weight: only the second has one.
    by_logit = -0.75 * (math.log(0.75) + value.item())
    assert one.grad.item() == pytest.approx(by_logit * math.log(3), rel=1e-5)
    torch.testing.assert_close(token_entropy(one, torch.zeros(50, 1)), torch.tensor([50.0]).log())


def test_the_statistic_has_the_same_value():
    hidden, weight, _ = problem()
    _, stats = token_stats(hidden, LmHead(weight), torch.randint(V, (37,)))
    torch.testing.assert_close(token_entropy(hidden, weight), stats.entropy, rtol=1e-6, atol=1e-6)


def test_every_path_gives_the_same_bits():
    hidden, weight, _ = problem(n=40)
    values = [token_entropy(hidden, weight)]
    hidden.requires_grad_()
    values += [token_entropy(hidden, weight), token_entropy(hidden, weight, max_bytes=TWO_BLOCKS)]
    values.append(token_entropy(hidden, weight.requires_grad_()))
    assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_tokens_that_are_excluded_or_all_but_certain(trained):
    hidden, weight, bias = problem(bias=True)
    bias[::5] = -math.inf
    bias[7] = 60.0
    coefficients = torch.ones(37).double()
    wide = [t.double() for t in (hidden, weight, bias)]
    _, by = gradients(oracle, wide, False, coefficients)
    got, ours = gradients(token_entropy, (hidden, weight, bias), trained, coefficients)
    assert got.isfinite().all() and (got > -1e-6).all()
    assert all(g.isfinite().all() for g in ours)
    torch.testing.assert_close(ours[0], by[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_factors(half_factors, dtype, trained):
    """As on a GPU: gradients of logits are rounded, fp16 keeps small ones by a scale."""
    leaves, coefficients = problem(dtype=dtype), torch.full((37,), 1e-6).double()
    _, by = gradients(oracle, [leaves[0].double(), leaves[1].double(), None], trained, coefficients)
    seen = half_factors(dtype)
    got, ours = gradients(token_entropy, leaves, trained, coefficients)
    assert got.dtype == torch.float32 and seen == {dtype}
    limit = 3 * torch.finfo(dtype).eps
    for a, b in zip(ours, by, strict=True):
        # fp16 results as small as these are no normal numbers, whatever is done before.
        spacing = 6e-8 * a.numel() ** 0.5 if dtype == torch.float16 else 0.0
        assert (a - b).norm() <= limit * b.norm() + spacing


@pytest.mark.parametrize(
    ("trained", "units"), [(None, 1), (False, 2), (True, 4)], ids=["score", "frozen", "recompute"]
)
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("max_bytes", [None, 16 * 1000 * 40], ids=["default", "scarce"])
def test_cost_and_memory_are_those_of_the_plan(trained, units, softcap, max_bytes):
    n, v, d = 320, 1000, 32
    with HeldBytes() as held:
        hidden, weight = torch.randn(n, d), torch.randn(v, d)
        hidden.requires_grad_(trained is not None)
        weight.requires_grad_(bool(trained))
        plan = plan_call(
            hidden, LmHead(weight, softcap=softcap), stats=True, entropy=True, max_bytes=max_bytes
        )
        held.restart()
        total = token_entropy(hidden, weight, softcap=softcap, max_bytes=max_bytes).sum()
        if trained is not None:
            total.backward()
        grads = [t.grad for t in (hidden, weight) if t.grad is not None]
        most = held.peak([hidden, weight, *grads])
    assert plan.gemms == units and held.flop == units * 2 * n * v * d
    if max_bytes is not None:
        assert plan.extra_bytes <= max_bytes and plan.block_rows < n
    assert most <= plan.extra_bytes + 16 * 8 * n  # a few numbers a token


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize("trained", [None, False, True], ids=["score", "frozen", "recompute"])
@pytest.mark.parametrize("max_mib", [None, 300], ids=["default", "300-MiB"])
def test_memory_at_the_sizes_of_an_8b_model(trained, engine, max_mib):
    n, v, d = 8192, 128256, 4096
    max_bytes = max_mib and max_mib << 20
    with counted() as held:
        hidden, weight = (torch.empty(r, d, dtype=torch.bfloat16, device=META) for r in (n, v))
        hidden.requires_grad_(trained is not None)
        weight.requires_grad_(bool(trained))
        plan = plan_call(
            hidden, LmHead(weight), stats=True, entropy=True, engine=engine, max_bytes=max_bytes
        )
        held.restart()
        total = token_entropy(hidden, weight, engine=engine, max_bytes=max_bytes).sum()
        if trained is not None:
            total.backward()
        grads = [t.grad for t in (hidden, weight) if t.grad is not None]
        most = held.peak([hidden, weight, *grads])
    assert held.flop == plan.gemms * 2 * n * v * d
    assert most <= plan.extra_bytes + 64 * 8 * n
    assert max_bytes is None or plan.extra_bytes <= max_bytes


def test_the_fused_kernel_gives_the_same_values_and_no_gradient():
    hidden, weight, bias = problem(bias=True)
    want = token_entropy(hidden, weight, bias=bias)
    got = token_entropy(hidden, weight, bias=bias, engine="fused")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a call without gradient"):
        token_entropy(hidden.requires_grad_(), weight, engine="fused")


def test_no_token_and_backward_twice():
    hidden, weight, _ = problem(n=0)
    weight.requires_grad_()
    token_entropy(hidden, weight).sum().backward()
    assert not weight.grad.any()
    for trained in (True, False):
        leaf, weight, _ = problem()
        leaf.requires_grad_()
        weight.requires_grad_(trained)
        total = token_entropy(leaf, weight).sum()
        first = torch.autograd.grad(total, leaf, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(total, leaf)[0])
        with torch.no_grad():
            assert not token_entropy(leaf, weight).requires_grad


def test_autocast_changes_nothing_on_cpu():
    leaves, coefficients = problem(), torch.randn(37)
    want = gradients(token_entropy, leaves, True, coefficients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(token_entropy, leaves, True, coefficients)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


H, W = torch.zeros(3, 4), torch.zeros(7, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_entropy(H, W[:, :3]), ValueError, r"weight: expected shape \[V, D\]"),
        (lambda: token_entropy(H[None], W), ValueError, r"hidden_states: expected shape \[N, D\]"),
        (lambda: token_entropy(H.long(), W), TypeError, "hidden_states: expected fp16, bf16"),
        (lambda: token_entropy(H, W, bias=H[0]), ValueError, r"bias: expected shape \[7\]"),
        (lambda: token_entropy(H, W, softcap=-1.0), ValueError, "softcap: expected a finite"),
        (
            lambda: token_entropy(H, W, impl="single_pass"), ValueError,
            "impl: expected one of 'auto', 'score', 'frozen', 'recompute', got 'single_pass'",
        ),
        (lambda: token_entropy(H, W, engine="fast"), ValueError, "engine: expected one of"),
        (lambda: token_entropy(H, W, max_bytes=27), ValueError, "max_bytes: expected at least 28"),
    ],
    ids=["weight", "hidden-shape", "hidden-dtype", "bias", "softcap", "impl", "engine", "budget"],
)  # fmt: skip
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_second_derivatives_are_refused():
    hidden = H.clone().requires_grad_()
    (grad,) = torch.autograd.grad(token_entropy(hidden, W).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="expected first derivatives alone"):
        grad.sum().backward()
