"""``token_entropy`` under ``torch.compile``: one node, the same bits as without it."""

from __future__ import annotations

import pytest
import torch

from fastdaa import token_entropy

N, D, V = 11, 8, 29


def tensors(dtype=torch.float32, trained=True, bias=False):
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_(trained)
    return hidden, weight, torch.randn(V).to(dtype).requires_grad_(trained) if bias else None


CASES = [
    pytest.param({}, {}, id="recompute"),
    pytest.param({"trained": False}, {}, id="frozen"),
    pytest.param({"trained": False}, {"impl": "recompute"}, id="frozen-recompute"),
    pytest.param(
        {"bias": True}, {"softcap": 3.0, "temperature": 0.7, "logit_scale": 0.5}, id="options"
    ),
    pytest.param({"dtype": torch.bfloat16}, {}, id="bf16"),
    pytest.param({"dtype": torch.bfloat16, "trained": False}, {}, id="bf16-frozen"),
    pytest.param({}, {"max_bytes": 4 * V * 24}, id="small-tiles"),
    pytest.param({"trained": False}, {"max_bytes": 8 * N * D}, id="frozen-fits"),
    pytest.param({"trained": False}, {"max_bytes": 4 * N * D}, id="frozen-does-not-fit"),
    pytest.param({}, {"engine": "triton"}, id="triton", marks=pytest.mark.interpreter),
]


@pytest.mark.parametrize(("made", "options"), CASES)
def test_token_entropy_is_one_node(same_compiled, made, options):
    hidden, weight, bias = leaves = tensors(**made)

    def loss():
        return token_entropy(torch.tanh(hidden), weight, bias=bias, **options).sin().sum()

    same_compiled(torch.compile(loss, backend="aot_eager", fullgraph=True), loss, leaves)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_products_of_half_precision_factors(same_compiled, half_factors, trained):
    seen = half_factors(torch.bfloat16)
    hidden, weight, _ = leaves = tensors(torch.bfloat16, trained)

    def loss():
        return token_entropy(torch.tanh(hidden), weight).sum()

    same_compiled(torch.compile(loss, backend="aot_eager", fullgraph=True), loss, leaves)
    assert seen == {torch.bfloat16}


def test_one_graph_for_all_lengths(same_compiled):
    weight, graphs = torch.randn(V, D, requires_grad=True), []

    def model(x):
        return token_entropy(torch.tanh(x), weight).mean()

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, dynamic=True)
    for tokens in (7, 4, 19):
        x = torch.randn(tokens, D, requires_grad=True)
        same_compiled(lambda x=x: compiled(x), lambda x=x: model(x), [x, weight])
    assert len(graphs) == 1


def test_without_gradient_values_alone_are_computed(same_compiled):
    hidden, weight, bias = tensors(bias=True)

    @torch.no_grad()
    def values():
        return token_entropy(hidden, weight, bias=bias)

    compiled = torch.compile(values, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(), values())
    assert not compiled().requires_grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_result_may_be_changed_in_place(same_compiled, backend):
    hidden, weight, _ = leaves = tensors()

    def loss():
        return token_entropy(hidden, weight).mul_(0.5).sum()

    same_compiled(torch.compile(loss, backend=backend, fullgraph=True), loss, leaves)


@pytest.mark.parametrize(
    ("width", "options", "message"),
    [
        pytest.param(D - 1, {}, r"weight: expected shape \[V, D\]", id="weight"),
        pytest.param(D, {"impl": "single_pass"}, "impl: expected one of 'auto'", id="impl"),
        pytest.param(D, {"impl": "score"}, "score", id="score-with-gradient"),
        pytest.param(D, {"max_bytes": 1}, "max_bytes: expected at least", id="budget"),
    ],
)
def test_what_is_wrong_is_named(same_compiled, width, options, message):
    compiled = torch.compile(token_entropy, backend="aot_eager")
    with pytest.raises(ValueError, match=message):
        compiled(torch.randn(N, D, requires_grad=True), torch.randn(V, width), **options)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_operators_pass_the_library_check(trained):
    """torch.library.opcheck: schema, fake implementation, autograd registration."""
    leaves = tensors(bias=True, trained=trained)
    options = (3.0, 0.5, 0.7, torch.float32, "auto", "auto", None)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.fastdaa.token_entropy.default,
        (*leaves, *options, True, trained), test_utils=checks,
    )  # fmt: skip
    with torch.no_grad():
        state = torch.ops.fastdaa.token_entropy(*leaves, *options, True, True)
        torch.library.opcheck(
            torch.ops.fastdaa.token_entropy_gradients.default,
            (torch.randn(N), *leaves, *state, *options, [True, trained, trained]),
            test_utils=checks[:2],
        )  # fmt: skip
