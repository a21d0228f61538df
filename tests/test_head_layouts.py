"""Hidden states and weights that lie in memory as they like: transposed, with gaps, expanded."""

from __future__ import annotations

import pytest
import torch

from fastdaa import LmHead, memory, token_entropy, token_logps
from fastdaa.compiled_operators import present_fake
from fastdaa.plan_call import plan_call

N, D, V = 20, 24, 37
SCARCE = 900  # a gradient of the hidden states is more


def transposed(t):
    return t.T.contiguous().T


def with_gaps(t):
    return torch.stack([t, torch.zeros_like(t)], dim=2)[:, :, 0]


def of_one_row(t):
    return t[:1].expand_as(t)


LAYOUTS = {
    "transposed": (transposed, transposed),
    "transposed-weight": (torch.clone, transposed),
    "expanded": (of_one_row, with_gaps),
}
CALLS = {
    "frozen": {"impl": "frozen"},
    "frozen-scarce": {"max_bytes": SCARCE},
    "recompute": {"impl": "recompute"},
    "recompute-scarce": {"impl": "recompute", "max_bytes": SCARCE},
    "recompute-packed": {"impl": "recompute"},
    "single_pass": {"impl": "single_pass"},
}


def inputs(layout, dtype):
    """The same numbers in plain tensors and in the layout."""
    hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    if layout == "expanded":
        hidden = of_one_row(hidden).contiguous()
    lay_hidden, lay_weight = LAYOUTS[layout]
    return (hidden, weight), (lay_hidden(hidden), lay_weight(weight))


@pytest.mark.parametrize("engine", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_any_layout_gives_the_same_gradients(monkeypatch, half_factors, name, layout, engine):
    half_factors(torch.bfloat16)
    if "packed" in name:
        monkeypatch.setattr(memory, "_WIDE_SUM_BYTES", -(1 << 40))
    targets, found = torch.randint(V, (N,)), []
    for hidden, weight in inputs(layout, torch.bfloat16):
        leaves = [hidden.requires_grad_(), weight.requires_grad_("frozen" not in name)]
        call = {"engine": engine, **CALLS[name]}
        plan = plan_call(hidden, LmHead(weight), loss_inside="single" in name, coupled=True, **call)
        assert (plan.hidden_rows > 0) == ("scarce" in name)
        assert plan.packs_sum == ("packed" in name)
        logps = token_logps(hidden, weight, targets, **call)
        wanted = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(logps.square().sum(), wanted)
        # As the fake implementations of the compiled operators say.
        assert all(grad.is_contiguous() for grad in grads)
        found.append([logps, *grads])
    for got, want in zip(*found, strict=True):
        # The same numbers; only a CPU's products may add in another order.
        assert (got - want).norm() <= 2.0**-8 * want.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_any_layout_gives_the_same_entropies(layout, trained):
    found = []
    for hidden, weight in inputs(layout, torch.float32):
        leaves = [hidden.requires_grad_(), weight.requires_grad_(trained)]
        values = token_entropy(hidden, weight)
        wanted = [t for t in leaves if t.requires_grad]
        found.append([values, *torch.autograd.grad(values.square().sum(), wanted)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_fake_gradients_lie_in_memory_as_real_ones_do():
    """A compiler plans memory by them; inductor stops where they differ."""
    (_, leaves), wanted = inputs("transposed", torch.bfloat16), [True, True, False]
    fakes = present_fake((*leaves, None), wanted)
    assert [tuple(t.shape) for t in fakes[:2]] == [(N, D), (V, D)]
    assert all(t.is_contiguous() for t in fakes)
