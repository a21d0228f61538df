"""``token_logps(impl="single_pass")`` under ``torch.compile``: the bits of an eager call."""

from __future__ import annotations

import pytest
import torch
from kept_calls import keep_at_most

from fastdaa import token_logps
from fastdaa.single_pass_memory import SinglePassRoom

N, V, D = 13, 67, 8
HALF = torch.bfloat16


@pytest.fixture
def in_part(monkeypatch):
    """``in_part()``: gradients of 32 columns of 13 tokens fit."""

    def start():
        keep_at_most(monkeypatch, 2 * N * 32)
        monkeypatch.setattr(SinglePassRoom, "whole", lambda self: None)

    return start


def tensors(dtype=torch.float32, trained=(True, True, True)):
    shapes = ((N, D), (V, D), (V,))
    return [
        torch.randn(*shape).to(dtype).requires_grad_(want)
        for shape, want in zip(shapes, trained, strict=True)
    ]


def loss_of(leaves, **options):
    hidden, weight, bias = leaves
    targets = torch.randint(0, V, (N,))

    def loss():
        logps = token_logps(
            hidden, weight, targets, bias=bias, softcap=3.0, impl="single_pass", **options
        )
        return logps.exp().sum() + logps.mul_(0.5).logsumexp(0)

    return loss


# PyTorch's own use of what it deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "aot_eager_decomp_partition"])
def test_bf16_factors(same_compiled, half_factors, in_part, part, backend):
    half_factors(HALF)
    if part:
        in_part()
    leaves = tensors(HALF)
    loss = loss_of(leaves)
    same_compiled(torch.compile(loss, backend=backend, fullgraph=True), loss, leaves)


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False)], ids=str)
def test_one_gradient_alone(same_compiled, trained):
    leaves = tensors(trained=trained)
    loss = loss_of(leaves)
    wanted = [t for t in leaves if t.requires_grad]
    same_compiled(torch.compile(loss, backend="aot_eager"), loss, wanted)


def test_a_gradient_that_is_not_asked_for(half_factors, in_part):
    """Forward planned for all of them."""
    half_factors(HALF)
    in_part()
    leaves = tensors(HALF)
    loss = loss_of(leaves)
    compiled = torch.compile(loss, backend="aot_eager")
    for some in (leaves[:1], leaves[1:2]):
        want, got = (torch.autograd.grad(call(), some) for call in (loss, compiled))
        assert torch.equal(got[0], want[0])


def test_one_graph_for_all_lengths(same_compiled, half_factors):
    half_factors(HALF)
    weight, graphs = torch.randn(V, D).to(HALF).requires_grad_(), []

    def model(x, targets):
        return token_logps(torch.tanh(x), weight, targets, impl="single_pass").exp().sum()

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, dynamic=True)
    for tokens in (7, 4, 19):
        x = torch.randn(tokens, D).to(HALF).requires_grad_()
        targets = torch.randint(0, V, (tokens,))
        same_compiled(
            lambda x=x, t=targets: compiled(x, t), lambda x=x, t=targets: model(x, t), [x, weight]
        )
    assert len(graphs) == 1


def test_what_does_not_fit_is_named():
    leaves = tensors(torch.float64)
    with pytest.raises(ValueError, match="max_bytes: expected at least"):
        torch.compile(loss_of(leaves, max_bytes=1), backend="aot_eager")()


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_operators_pass_the_library_check(half_factors, in_part, part):
    half_factors(HALF)
    if part:
        in_part()
    leaves, targets = tensors(HALF), torch.randint(0, V, (N,))
    options = (3.0, 1.0, 1.0, None, None, HALF, "auto", None, False, [True, True])
    call = (*leaves, targets, *options)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fastdaa.kept_logps.default, call, test_utils=checks)
    with torch.no_grad():
        output = torch.ops.fastdaa.kept_logps(*call)
        assert (output[1].numel(), output[3].shape) == ((N, (N, 32)) if part else (0, (N, V)))
        more = (torch.randn(N), *leaves, targets, *output, *options, [True, True, False])
        torch.library.opcheck(
            torch.ops.fastdaa.kept_logps_gradients.default, more, test_utils=checks[:2]
        )
