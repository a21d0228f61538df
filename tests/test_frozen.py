"""A frozen head with half-precision factors, as on a GPU: slopes and their factors.

Products are the model of ``half_factors``, kernels run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from fastdaa import engines, reference, token_logps

pytest.importorskip("triton")

N, D, V = 40, 24, 203
ENGINES = [
    "torch",
    pytest.param("triton", marks=pytest.mark.interpreter),
]


def problem(dtype, peak):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) * peak / D**0.5).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    # Some targets are nearly certain.
    targets[::4] = (hidden[::4].double() @ weight.double().T).argmax(dim=1)
    coefficients = torch.randn(N, generator=generator)
    return hidden.requires_grad_(), weight, targets, coefficients


def materialised(hidden, weight, targets, softcap=None, logit_scale=1.0):
    """fp32 logits from products of fp32 factors, and autograd."""
    logits = logit_scale * (hidden.float() @ weight.float().T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]


def gradients(logps_of, made, dtype, **options):
    hidden, weight, targets, coefficients = made
    inputs = hidden.detach().to(dtype).requires_grad_(), weight.to(dtype)
    logps = logps_of(*inputs, targets, **options)
    (grad,) = torch.autograd.grad((logps * coefficients.to(logps.dtype)).sum(), inputs[0])
    return logps.detach().double(), grad.double()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("peak", [0.1, 3.0, 12.0], ids=["flat", "peaked", "very-peaked"])
@pytest.mark.parametrize("head", [{}, {"softcap": 4.0, "logit_scale": 1.5}], ids=["plain", "cap"])
def test_gradients_are_as_good_as_those_of_materialised_logits(
    half_factors, engine, dtype, peak, head
):
    made = problem(dtype, peak)
    truth = gradients(reference.token_logps, made, torch.float64, **head)
    eager = gradients(materialised, made, dtype, **head)
    seen = half_factors(dtype)
    ours = gradients(token_logps, made, dtype, impl="frozen", engine=engine, **head)
    assert seen == {dtype}
    assert (ours[0] - truth[0]).abs().max() < 1e-4
    error, allowed = ((grads - truth[1]).norm() for grads in (ours[1], eager[1]))
    # Its own rounding to half precision is all but the only error: the target's part is exact.
    # The interpreter truncates to bf16, which is twice as coarse as rounding, and to one side.
    assert error <= (2.0 if engine == "triton" and dtype == torch.bfloat16 else 1.1) * allowed


@pytest.mark.interpreter
def test_triton_reads_bf16_logits_once(half_factors, monkeypatch):
    half_factors(torch.bfloat16)
    made = problem(torch.bfloat16, 3.0)
    want = gradients(token_logps, made, torch.bfloat16, impl="frozen", engine="triton")
    monkeypatch.setattr(engines.TritonTile, "gradient", None)
    got = gradients(token_logps, made, torch.bfloat16, impl="frozen", engine="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        ref = token_logps(*made[:3], engine="triton")
    assert torch.equal(ref.double(), got[0])
