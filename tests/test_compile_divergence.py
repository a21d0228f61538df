"""``token_divergence`` under ``torch.compile``: one node, the same bits as without it."""

from __future__ import annotations

import pytest
import torch

from fastdaa import LmHead, VocabShard, token_divergence, token_kl

N, D, V = 11, 8, 29


def tensors(dtype=torch.float32, trained=True, bias=False):
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_(trained)
    return hidden, weight, torch.randn(V).to(dtype).requires_grad_(trained) if bias else None


CASES = [
    pytest.param("kl", {}, {}, torch.float32, id="kl"),
    pytest.param("reverse_kl", {"trained": False}, {}, torch.float32, id="reverse-kl-frozen"),
    pytest.param(
        "js", {"bias": True}, {"softcap": 3.0, "temperature": 0.7}, torch.float32, id="js-options"
    ),
    pytest.param(
        "kl", {"dtype": torch.bfloat16}, {"logit_scale": 0.5}, torch.float32, id="bf16-against-fp32"
    ),
    pytest.param("reverse_kl", {"dtype": torch.float32}, {}, torch.float64, id="fp64-ref"),
]


@pytest.mark.parametrize(("kind", "made", "options", "ref_dtype"), CASES)
def test_token_divergence_is_one_node(same_compiled, kind, made, options, ref_dtype):
    hidden, weight, bias = leaves = tensors(**made)
    ref = torch.randn(N, 5, dtype=ref_dtype), torch.randn(V, 5, dtype=ref_dtype)

    def loss():
        values = token_divergence(
            torch.tanh(hidden), LmHead(weight, bias, **options), ref[0], LmHead(ref[1]), kind=kind
        )
        return values.sin().sum()

    same_compiled(torch.compile(loss, backend="aot_eager", fullgraph=True), loss, leaves)


def test_products_of_half_precision_factors(same_compiled, half_factors):
    seen = half_factors(torch.bfloat16)
    hidden, weight, _ = leaves = tensors(torch.bfloat16)
    ref = torch.randn(N, D).to(torch.bfloat16)

    def loss():
        return token_kl(torch.tanh(hidden), LmHead(weight), ref, LmHead(weight)).sum()

    same_compiled(torch.compile(loss, backend="aot_eager", fullgraph=True), loss, leaves)
    assert torch.bfloat16 in seen


def test_one_graph_for_all_lengths_and_no_gradient_for_the_reference(same_compiled):
    """The policy is its own reference here, as in a test of a fresh copy."""
    weight, graphs = torch.randn(V, D, requires_grad=True), []

    def model(x, ref):
        return token_kl(torch.tanh(x), LmHead(weight), ref, LmHead(weight)).sum()

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for tokens in (7, 4, 19):
        x, ref = (torch.randn(tokens, D, requires_grad=True) for _ in range(2))
        same_compiled(
            lambda x=x, ref=ref: compiled(x, ref), lambda x=x, ref=ref: model(x, ref), [x, weight]
        )
        assert torch.autograd.grad(compiled(x, ref), [ref], allow_unused=True) == (None,)
    assert len(graphs) == 1


def test_without_gradient_values_alone_are_computed(same_compiled):
    hidden, weight, _ = tensors()
    ref = torch.randn(N, D)

    @torch.no_grad()
    def values():
        return token_divergence(hidden, LmHead(weight), ref, LmHead(weight), kind="js")

    compiled = torch.compile(values, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(), values())
    assert not compiled().requires_grad


def test_what_is_wrong_is_named(same_compiled, monkeypatch):
    hidden, weight, _ = tensors()
    kl = torch.compile(token_kl, backend="eager")
    with pytest.raises(ValueError, match=r"ref_head: expected a vocabulary of 29, got 28"):
        kl(hidden, LmHead(weight), hidden.detach(), LmHead(weight.detach()[1:]))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    part = LmHead(weight, shard=VocabShard(0, 2 * V))
    with pytest.raises(ValueError, match="expected the whole vocabulary, got a slice"):
        kl(hidden, part, hidden.detach(), part)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_operators_pass_the_library_check(trained):
    """torch.library.opcheck: schema, fake implementation, autograd registration."""
    leaves = tensors(bias=True, trained=trained)
    ref = torch.randn(N, 5), torch.randn(V, 5), None
    options = (
        3.0, 0.5, 1.0, None, 1.0, 0.7, torch.float32, torch.float32, "js", "auto", None,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.fastdaa.token_divergence.default,
        (*leaves, *ref, *options, True, trained), test_utils=checks,
    )  # fmt: skip
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.fastdaa.token_divergence_gradients.default,
            (torch.randn(N), *leaves, *ref, *options, [True, trained, trained]),
            test_utils=checks[:2],
        )  # fmt: skip
