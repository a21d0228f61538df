"""Gradients of gradients: refused by the fused paths, never silently 0."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from fastdaa import (
    FusedLinearDPOLoss,
    LmHead,
    Objective,
    pair_loss,
    select_pairs,
    token_divergence,
    token_logps,
)

H, W = torch.randn(6, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
T = torch.arange(6)
LABELS = torch.tensor([[-100, 1, 2], [-100, 3, 4]])


def dpo(hidden, weight, impl="auto"):
    batch = select_pairs(LABELS)
    return pair_loss(
        hidden, LmHead(weight), batch, Objective.parse("dpo"), ref_logps=torch.zeros(2).double(),
        impl=impl,
    ).loss  # fmt: skip


CALLS = {
    "recompute": lambda h, w: token_logps(h, w, T).sum(),
    "frozen": lambda h, w: token_logps(h, w.detach(), T).sum(),
    "single-pass": dpo,
    "kept": lambda h, w: token_logps(h, w, T, impl="single_pass").sum(),
    "loss-outside": lambda h, w: dpo(h, w, impl="recompute"),
    "module": lambda h, w: (
        FusedLinearDPOLoss()(h.view(2, 3, 8), w, LABELS, ref_logps=torch.zeros(2).double()).loss
    ),
    "divergence": lambda h, w: token_divergence(h, LmHead(w), H + 1, LmHead(W)).sum(),
    "frozen-divergence": lambda h, w: token_divergence(
        h, LmHead(w.detach()), H + 1, LmHead(W)
    ).sum(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_gradient_penalty_is_refused(call):
    """Even where the gradient that comes in is a plain 1."""
    hidden, weight = H.clone().requires_grad_(), W.clone().requires_grad_()
    loss = call(hidden, weight)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="expected first derivatives alone"):
        (loss + grad.square().sum()).backward()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_create_graph_alone_changes_nothing(call):
    """Optimisers that ask for it and do not use the head's part keep working."""
    hidden, weight = H.clone().requires_grad_(), W.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(hidden, weight), hidden)
    (got,) = torch.autograd.grad(call(hidden, weight), hidden, create_graph=True)
    assert torch.equal(got, expected)


def test_the_reference_has_second_derivatives():
    def loss(hidden):
        return token_logps(hidden, W, T, impl="reference")

    assert torch.autograd.gradgradcheck(loss, (H.clone().requires_grad_(),))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_batch_of_gradients_is_refused(call):
    hidden, weight = H.clone().requires_grad_(), W.clone().requires_grad_()
    loss = call(hidden, weight)
    with pytest.raises(RuntimeError, match="expected one gradient at a time, got a batch"):
        torch.autograd.grad(
            loss, hidden, torch.ones(3, *loss.shape).double(), is_grads_batched=True
        )


# PyTorch's own, at the first dual number of a process.
IN_FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def _tangents(call):
    with forward_ad.dual_level():
        hidden = forward_ad.make_dual(H.float(), torch.ones_like(H).float())
        return forward_ad.unpack_dual(call(hidden)).tangent


@IN_FORWARD_MODE
def test_forward_mode_is_right_in_plain_torch_where_nothing_is_wanted_in_backward():
    found = _tangents(lambda h: token_logps(h, W.float(), T, softcap=3.0))
    want = _tangents(lambda h: token_logps(h, W.float(), T, softcap=3.0, impl="reference"))
    assert torch.allclose(found, want, atol=1e-5)


@IN_FORWARD_MODE
@pytest.mark.interpreter
@pytest.mark.parametrize("engine", ["triton", "fused"])
def test_kernels_do_not_lose_derivatives_of_forward_mode(engine):
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="expected tensors without tangents"):
        _tangents(lambda h: token_logps(h, W.float(), T, engine=engine))
    with pytest.raises(RuntimeError, match="expected tensors without tangents"):
        _tangents(lambda h: token_logps(H.float(), W.float(), T, bias=h.T[0].repeat(2)[:11],
                                        engine=engine))  # fmt: skip
