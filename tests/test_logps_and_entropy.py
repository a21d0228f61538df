"""Log-probs and entropies with one gradient: against materialised logits, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from device_memory import META, counted

from fastdaa import (
    LmHead,
    plan_head,
    reference,
    token_entropy,
    token_logps,
    token_logps_and_entropy,
)
from fastdaa.logps import head_logps_and_stats
from fastdaa.plan_call import plan_call

N, V, D = 37, 97, 16
OPTIONS = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.5}
IN_BLOCKS = 4 * V * 24
TARGETS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0))


def problem(dtype=torch.float32, bias=False):
    made = [torch.randn(N, D), torch.randn(V, D), torch.randn(V) if bias else None]
    return [None if t is None else t.to(dtype) for t in made]


def oracle(hidden, weight, targets, bias=None, **options):
    logps = reference.logits(hidden, weight, bias=bias, **options).log_softmax(dim=1)
    entropy = -(logps.exp() * logps.clamp(min=-1e4)).sum(dim=1)
    return logps.gather(1, targets[:, None])[:, 0], entropy


def loss_of(logps, entropy, coefficients):
    """Any loss of the two; a third of the tokens has no part in it, some in one of them alone."""
    c, h = coefficients.to(logps.dtype)
    return (c * logps.exp() * 3 + c * logps + h * entropy).sum()


def coefficients_of():
    c, h = torch.randn(2, N, generator=torch.Generator().manual_seed(1))
    c[::3], h[::3], c[1::6], h[4::6] = 0.0, 0.0, 0.0, 0.0
    return torch.stack([c, h])


def gradients(call, leaves, trained, coefficients, **options):
    leaves = [None if t is None else t.detach().clone() for t in leaves]
    wanted = [t for t in leaves[: 3 if trained else 1] if t is not None]
    for t in wanted:
        t.requires_grad_()
    values = call(leaves[0], leaves[1], TARGETS, bias=leaves[2], **options)
    grads = torch.autograd.grad(loss_of(*values, coefficients), wanted)
    return [v.detach() for v in values], [g.double() for g in grads]


@pytest.mark.interpreter
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("max_bytes", [None, IN_BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        pytest.param("torch", {}, id="torch"),
        pytest.param("torch", OPTIONS, id="torch-everything"),
        pytest.param("triton", {}, id="triton"),
        pytest.param("triton", OPTIONS, id="triton-everything"),
    ],
)
def test_values_and_gradients_are_those_of_materialised_logits(engine, options, max_bytes, trained):
    leaves = problem(bias=bool(options))
    wide = [None if t is None else t.double() for t in leaves]
    want, by = gradients(oracle, wide, trained, coefficients_of(), **options)
    got, ours = gradients(
        token_logps_and_entropy, leaves, trained, coefficients_of(), engine=engine,
        max_bytes=max_bytes, **options,
    )  # fmt: skip
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=3e-6)
    for a, b in zip(ours, by, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert not ours[0][::3].any() and ours[0][1].any() and ours[0][4].any()


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("max_bytes", [None, 8 * 7 * 16], ids=["whole", "blocks"])
def test_gradcheck(trained, max_bytes):
    hidden, weight, bias = (torch.randn(*s).double() for s in ((20, 3), (7, 3), (7,)))
    targets = torch.randint(7, (20,))
    leaves = [hidden.requires_grad_()]
    if trained:
        leaves += [weight.requires_grad_(), bias.requires_grad_()]

    def call(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return token_logps_and_entropy(
            hidden, weight, targets, bias=bias, max_bytes=max_bytes, **OPTIONS
        )

    assert torch.autograd.gradcheck(call, leaves)


def test_values_are_those_of_each_alone():
    hidden, weight, _ = problem()
    for trained in (None, False, True):
        hidden.requires_grad_(trained is not None)
        weight.requires_grad_(bool(trained))
        logps, entropy = token_logps_and_entropy(hidden, weight, TARGETS)
        # Which token's part of a sum joins last is another.
        torch.testing.assert_close(entropy, token_entropy(hidden, weight), rtol=1e-6, atol=2e-6)
        assert torch.equal(logps, token_logps(hidden, weight, TARGETS))
        assert logps.requires_grad == entropy.requires_grad == (trained is not None)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_loss_of_one_of_them_has_its_gradient(trained):
    leaves = problem()
    for of, alone in ((0, token_logps), (1, token_entropy)):
        grads = []
        for call in (token_logps_and_entropy, alone):
            hidden, weight = (t.clone() for t in leaves[:2])
            wanted = [hidden.requires_grad_(), weight.requires_grad_(trained)][: 1 + trained]
            values = call(hidden, weight, *([] if call is token_entropy else [TARGETS]))
            value = values if call is alone else values[of]
            total = value.square().sum()
            first = torch.autograd.grad(total, wanted, retain_graph=True)
            grads.append(torch.autograd.grad(total, wanted))
            assert all(torch.equal(a, b) for a, b in zip(first, grads[-1], strict=True))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_tokens_that_are_excluded_or_all_but_certain(trained):
    leaves = problem(bias=True)
    unlikely = torch.zeros(V, dtype=torch.bool).index_fill_(0, TARGETS, True).logical_not()
    leaves[2][unlikely.nonzero()[::4, 0]] = -math.inf
    leaves[2][TARGETS[1]] = 60.0
    wide = [t.double() for t in leaves]
    _, by = gradients(oracle, wide, False, coefficients_of())
    got, ours = gradients(token_logps_and_entropy, leaves, trained, coefficients_of())
    assert all(value.isfinite().all() for value in (*got, *ours))
    torch.testing.assert_close(ours[0], by[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("peak", [0.1, 3.0, 20.0])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_no_less_exact_than_materialised_logits(half_factors, dtype, trained, peak):
    """``(h @ w.T).float()`` and autograd; ours with the products that a GPU has."""
    n, v, d = 512, 1000, 64
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(v, d) * peak / d**0.5).to(dtype)
    p = (hidden.double() @ weight.double().T).softmax(dim=1)
    targets, (c, h) = torch.multinomial(p, 1)[:, 0], torch.randn(2, n).double()

    def errors(values_of, like, truth=None):
        leaves = [t.to(like).clone() for t in (hidden, weight)]
        wanted = [leaf.requires_grad_() for leaf in leaves[: 1 + trained]]
        logps, entropy = values_of(*leaves, targets)
        total = (c.to(logps.dtype) * logps + 0.1 * h.to(logps.dtype) * entropy).sum()
        grads = [g.double() for g in torch.autograd.grad(total, wanted)]
        if truth is None:
            return grads
        return [((a - b).norm() / b.norm()).item() for a, b in zip(grads, truth, strict=True)]

    def materialised(hidden, weight, targets):
        z = hidden @ weight.T
        logps = (z if z.dtype == torch.float64 else z.float()).log_softmax(dim=1)
        return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(dim=1)

    truth = errors(materialised, torch.float64)
    theirs = errors(materialised, dtype, truth)
    seen = half_factors(dtype)
    ours = errors(token_logps_and_entropy, dtype, truth)
    assert seen == {dtype}
    for got, other in zip(ours, theirs, strict=True):
        assert got <= 1.02 * other


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize(
    ("trained", "units"), [(None, 1), (False, 3), (True, 4)], ids=["score", "frozen", "trained"]
)
@pytest.mark.parametrize("max_mib", [None, 300], ids=["default", "300-MiB"])
def test_cost_and_memory_at_the_sizes_of_an_8b_model(trained, units, engine, max_mib):
    n, v, d = 8192, 128256, 4096
    max_bytes = max_mib and max_mib << 20
    with counted() as held:
        hidden, weight = (torch.empty(r, d, dtype=torch.bfloat16, device=META) for r in (n, v))
        targets = torch.empty(n, dtype=torch.int64, device=META)
        hidden.requires_grad_(trained is not None)
        weight.requires_grad_(bool(trained))
        options = {"engine": engine, "max_bytes": max_bytes}
        plan = plan_call(hidden, LmHead(weight), stats=True, bonus=True, **options)
        held.restart()
        total = sum(t.sum() for t in token_logps_and_entropy(hidden, weight, targets, **options))
        if trained is not None:
            total.backward()
        grads = [t.grad for t in (hidden, weight) if t.grad is not None]
        most = held.peak([hidden, weight, targets, *grads])
    assert held.flop == units * 2 * n * v * d
    assert most <= plan.extra_bytes + 100 * n
    assert max_bytes is None or plan.extra_bytes <= max_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "frozen"}, "impl: expected one of 'auto', 'score', 'recompute', got 'frozen'"),
        ({"impl": "score"}, "impl='score' gives no gradient"),
        ({"max_bytes": 1}, "max_bytes: expected at least"),
        ({"engine": "fused"}, "a call without gradient"),
    ],
)
def test_what_is_wrong_is_named(options, message):
    hidden, weight, _ = problem()
    with pytest.raises(ValueError, match=message):
        token_logps_and_entropy(hidden.requires_grad_(), weight, TARGETS, **options)


def test_no_token():
    _, weight, _ = problem()
    empty = torch.zeros(0, D)
    values = token_logps_and_entropy(empty, weight.requires_grad_(), TARGETS[:0])
    sum(value.sum() for value in values).backward()
    assert not weight.grad.any()


COMPILED = [
    pytest.param({}, {}, id="trained"),
    pytest.param({"trained": False}, {}, id="frozen"),
    pytest.param({"bias": True}, OPTIONS, id="everything"),
    pytest.param({"dtype": torch.bfloat16}, {}, id="bf16"),
    pytest.param({}, {"max_bytes": IN_BLOCKS}, id="blocks"),
    pytest.param({}, {"engine": "triton"}, id="triton", marks=pytest.mark.interpreter),
]


@pytest.mark.parametrize("of", ["both", "logps", "entropy"])
@pytest.mark.parametrize(("made", "options"), COMPILED)
def test_one_node_of_a_graph(same_compiled, made, options, of):
    trained = made.get("trained", True)
    leaves = problem(made.get("dtype", torch.float32), made.get("bias", False))
    leaves[0].requires_grad_()
    for leaf in leaves[1:]:
        if leaf is not None:
            leaf.requires_grad_(trained)
    hidden, weight, bias = leaves

    def loss():
        logps, entropy = token_logps_and_entropy(
            torch.tanh(hidden), weight, TARGETS, bias=bias, **options
        )
        logps = logps.mul_(0.5)  # a result may be changed in place
        return {"both": logps + entropy.sin(), "logps": logps, "entropy": entropy}[of].sum()

    same_compiled(torch.compile(loss, backend="aot_eager", fullgraph=True), loss, leaves)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_compiled_products_of_half_precision_factors(same_compiled, half_factors, trained):
    seen = half_factors(torch.bfloat16)
    hidden, weight, _ = leaves = problem(torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_(trained)

    def loss():
        return sum(t.sum() for t in token_logps_and_entropy(torch.tanh(hidden), weight, TARGETS))

    same_compiled(torch.compile(loss, backend="aot_eager", fullgraph=True), loss, leaves)
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("impl", ["frozen", "single_pass", "reference"])
def test_a_path_without_this_gradient_is_refused(impl):
    hidden, weight, _ = problem()
    with pytest.raises(ValueError, match="cannot serve a gradient of log-probs and entropies"):
        head_logps_and_stats(
            hidden.requires_grad_(), LmHead(weight), TARGETS, stats=True, bonus=True, impl=impl
        )
    plan = plan_head(V, "cpu", hidden_grad=True, head_grad=False, stats=True, bonus=True)
    assert (plan.path, plan.gemms) == ("recompute", 3)
    assert plan.reason == "log-probs and entropies have one gradient"


def test_one_graph_for_all_lengths(same_compiled):
    weight, graphs = torch.randn(V, D, requires_grad=True), []

    def model(x, targets):
        logps, entropy = token_logps_and_entropy(torch.tanh(x), weight, targets)
        return (logps + 0.1 * entropy).mean()

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, dynamic=True)
    for tokens in (7, 4, 19):
        x = torch.randn(tokens, D, requires_grad=True)
        call = x, TARGETS[:tokens]
        same_compiled(lambda c=call: compiled(*c), lambda c=call: model(*c), [x, weight])
    assert len(graphs) == 1


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_operators_pass_the_library_check(trained):
    """torch.library.opcheck: schema, fake implementation, autograd registration."""
    leaves = problem(bias=True)
    for leaf, wanted in zip(leaves, (True, trained, trained), strict=True):
        leaf.requires_grad_(wanted)
    options = (3.0, 0.5, 0.7, torch.float32, "auto", "auto", None)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.fastdaa.token_logps_and_entropy.default,
        (*leaves, TARGETS, *options, True, trained), test_utils=checks,
    )  # fmt: skip
    with torch.no_grad():
        state = torch.ops.fastdaa.token_logps_and_entropy(*leaves, TARGETS, *options, True, True)
        torch.library.opcheck(
            torch.ops.fastdaa.token_logps_and_entropy_gradients.default,
            (
                torch.randn(N), torch.randn(N), *leaves, TARGETS, *state, *options,
                [True, trained, trained],
            ),
            test_utils=checks[:2],
        )  # fmt: skip
