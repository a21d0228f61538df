"""Second derivatives, by every way that PyTorch has to ask for them: refused, never silently 0."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import functional

from fastdaa import (
    FusedLinearDPOLoss,
    LmHead,
    token_divergence,
    token_entropy,
    token_logps,
)

N, D, V = 6, 8, 11
H, W = (
    torch.randn(rows, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    for rows in (N, V)
)
TARGETS = torch.arange(N)
LABELS = torch.tensor([[-100, 1, 2], [-100, 3, 4]])


def dpo(hidden, weight):
    ref = torch.zeros(2, dtype=torch.float64)
    return FusedLinearDPOLoss()(hidden.view(2, 3, D), weight, LABELS, ref_logps=ref).loss


CALLS = {
    "trained": lambda h, w: token_logps(h, w, TARGETS).sum(),
    "outer-loss": lambda h, w: token_logps(h, w, TARGETS).sin().sum(),
    "frozen": lambda h, w: token_logps(h, w.detach(), TARGETS).sum(),
    "kept": lambda h, w: token_logps(h, w, TARGETS, impl="single_pass").sum(),
    "loss-inside": dpo,
    "entropy": lambda h, w: token_entropy(h, w).sum(),
    "frozen-entropy": lambda h, w: token_entropy(h, w.detach()).sum(),
    "divergence": lambda h, w: token_divergence(h, LmHead(w), H + 1, LmHead(W)).sum(),
    "frozen-divergence": lambda h, w: token_divergence(
        h, LmHead(w.detach()), H + 1, LmHead(W)
    ).sum(),
}


def penalty(call, hidden, weight):
    """Asks for the derivative of a sum, of which the loss has one."""
    loss = call(hidden, weight)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    torch.autograd.grad(loss + grad.square().sum(), hidden)


def penalty_of_a_backbone(call, hidden, weight):
    """The gradient passes through the head to layers that are differentiable themselves."""
    torch.manual_seed(0)
    layer = nn.Linear(D, D).double()
    loss = call(layer(hidden), weight)
    grads = torch.autograd.grad(loss, list(layer.parameters()), create_graph=True)
    torch.autograd.grad(loss + sum(g.square().sum() for g in grads), list(layer.parameters()))


WAYS = {
    "penalty": penalty,
    "penalty-of-a-backbone": penalty_of_a_backbone,
    "hessian": lambda call, h, w: functional.hessian(lambda x: call(x, w), h),
    "hvp": lambda call, h, w: functional.hvp(lambda x: call(x, w), h, torch.ones_like(h)),
    # PyTorch makes it from two backward passes.
    "jvp": lambda call, h, w: functional.jvp(lambda x: call(x, w), h, torch.ones_like(h)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_second_derivatives_are_refused(call, way):
    with pytest.raises(RuntimeError, match="expected first derivatives alone"):
        way(call, H.clone().requires_grad_(), W.clone().requires_grad_())


@pytest.mark.parametrize("call", [CALLS["trained"], CALLS["frozen"], dpo],
                         ids=["trained", "frozen", "loss-inside"])  # fmt: skip
def test_they_are_refused_in_a_graph_that_is_not_compiled_further(call):
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="expected first derivatives alone"):
        penalty(compiled, H.clone().requires_grad_(), W.clone().requires_grad_())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_first_ones_are_served_by_the_same_functions(call):
    weight = W.clone().requires_grad_()
    expected = functional.jacobian(lambda x: call(x, weight), H)
    one = torch.ones((), dtype=torch.float64)
    assert expected.abs().max() > 1e-3
    assert torch.equal(functional.vjp(lambda x: call(x, weight), H, one)[1], expected)


def test_a_gradient_that_does_not_pass_the_head_may_be_differentiated_again():
    """A penalty on a part of the model beside the head, as of an auxiliary loss."""
    hidden, weight = H.clone().requires_grad_(), W.clone().requires_grad_()
    loss = token_logps(hidden, weight, TARGETS).sum()
    (of_head,) = torch.autograd.grad(loss, hidden, create_graph=True)
    (grad,) = torch.autograd.grad(hidden.pow(3).sum(), hidden, create_graph=True)
    (second,) = torch.autograd.grad((of_head.detach() * grad).sum(), hidden)
    torch.testing.assert_close(second, 6 * H * of_head)
