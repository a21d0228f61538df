"""The gradient of the hidden states a block of rows at a time, where memory is scarce."""

from __future__ import annotations

import pytest
import torch

from fastdaa import (
    LmHead,
    Objective,
    TokenSelection,
    pair_loss,
    plan_head,
    token_entropy,
    token_logps,
)
from fastdaa.plan_call import plan_call

N, D, V = 200, 48, 61
LENGTHS = (60, 20, 0, 45, 50, 25)
SOME = 40  # rows for the interpreter
FEW = 16 * 4 * V  # 16 rows of logits; the fp32 gradient of the hidden states takes ten times that


def leaves(dtype, head_grad, bias=False):
    generator = torch.Generator().manual_seed(11)
    made = [torch.randn(n, D, generator=generator) for n in (N, V)]
    made += [torch.randn(V, generator=generator)] if bias else []
    made = [t.to(dtype) for t in made]
    return [made[0].requires_grad_(), *(t.requires_grad_(head_grad) for t in made[1:])]


def targets():
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))


def logps(hidden, weight, bias=None, **options):
    return token_logps(hidden, weight, targets(), bias=bias, softcap=9.0, **options).sin().sum()


def entropies(hidden, weight, bias=None, **options):
    return token_entropy(hidden, weight, bias=bias, temperature=0.7, **options).sin().sum()


def loss_of(name):
    def loss(hidden, weight, bias=None, **options):
        selection = TokenSelection(torch.arange(N), targets(), torch.tensor(LENGTHS), LENGTHS)
        ref = -4 * torch.tensor(LENGTHS, dtype=torch.float32)
        head = LmHead(weight, bias)
        return pair_loss(
            hidden, head, selection, Objective.parse(name), ref_logps=ref, **options
        ).loss

    return loss


CALLS = {"logps": logps, "entropy": entropies, "dpo": loss_of("dpo"), "slic": loss_of("slic")}


def gradients(call, made, **options):
    wanted = [t for t in made if t.requires_grad]
    return torch.autograd.grad(call(*made, **options), wanted)


def hidden_rows(made, call, **options):
    """Of the plan that a call takes."""
    hidden, *head = made
    inside = call not in (logps, entropies)
    return plan_call(
        hidden, LmHead(*head), entropy=call is entropies, stats=call is entropies,
        loss_inside=inside, selected=inside, sparse=call is CALLS["slic"], **options,
    ).hidden_rows  # fmt: skip


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("dtype", "head_grad"),
    [(torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["frozen-fp64", "frozen-bf16", "trained-bf16"],
)
@pytest.mark.parametrize("name", CALLS)
def test_scarce_memory_gives_the_gradients_of_plenty(name, dtype, head_grad, bias):
    call, made = CALLS[name], leaves(dtype, head_grad, bias)
    few = {"max_bytes": FEW, "impl": "recompute" if head_grad else "auto"}
    # The budget is too small for the copies of a pair loss, too.
    assert 0 < hidden_rows(made, call, **few) < N
    assert hidden_rows(made, call) == 0
    limit = 1e-12 if dtype == torch.float64 else 2.0**-7  # a last bit of bf16
    for few_bytes, plenty in zip(gradients(call, made, **few), gradients(call, made), strict=True):
        assert few_bytes.dtype == dtype
        error = (few_bytes.double() - plenty.double()).abs().max()
        assert error <= limit * plenty.double().abs().max()


@pytest.mark.interpreter
@pytest.mark.parametrize("head_grad", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_half_precision_products_are_as_good_as_with_plenty(half_factors, dtype, head_grad, engine):
    """As on a GPU; the truth is the call in fp64 on the same values."""
    half_factors(dtype)
    ids = targets()[:SOME]

    def some(head_grad):
        hidden, weight = leaves(dtype, head_grad)
        return hidden.detach()[:SOME].requires_grad_(), weight

    def call(hidden, weight, **options):
        return token_logps(hidden, weight, ids, softcap=9.0, **options).sin().sum()

    truths = gradients(call, [t.detach().double().requires_grad_() for t in some(True)])

    def errors(head_grad, **options):
        found = gradients(call, some(head_grad), engine=engine, **options)
        return [(g.double() - t).norm() / t.norm() for g, t in zip(found, truths, strict=False)]

    scarce = errors(head_grad, max_bytes=FEW, impl="recompute")
    assert len(scarce) == 1 + head_grad
    for ours, plenty in zip(scarce, errors(True, impl="recompute"), strict=False):
        assert ours <= 1.1 * plenty + 1e-4 and ours < 5e-3


def test_what_a_frozen_head_needs_is_said_and_true():
    made = leaves(torch.float32, head_grad=False)
    with pytest.raises(ValueError, match=r"expected (\d+) or more for impl='frozen'") as refusal:
        logps(*made, impl="frozen", max_bytes=FEW)
    least = int(str(refusal.value).split("expected ")[1].split()[0])
    logps(*made, impl="frozen", max_bytes=least).backward()
    with pytest.raises(ValueError, match="for impl='frozen'"):
        logps(*made, impl="frozen", max_bytes=least - 1)


@pytest.mark.parametrize(
    ("head_grad", "path", "gemms"), [(False, "recompute", 3), (True, "recompute", 5)]
)
def test_the_plan_says_the_cost(head_grad, path, gemms):
    plan = plan_head(
        128256, "cuda", hidden_grad=True, head_grad=head_grad, engine="torch", tokens=65536,
        hidden_size=4096, operand=torch.bfloat16, max_bytes=300 << 20,
    )  # fmt: skip
    assert (plan.path, plan.gemms) == (path, gemms) and plan.hidden_rows == 2048
    assert plan.extra_bytes <= 300 << 20
    said = plan.explain()
    assert f"recompute ({gemms}U" in said
    apart = "gradient of the hidden states apart, 2048 tokens at a time" in said
    assert apart == head_grad
    if not head_grad:
        assert "gradients of 1024 MiB would be kept, more than max_bytes allows" in said


def test_gradients_pass_gradcheck():
    hidden, weight = leaves(torch.float64, head_grad=False)
    some = hidden.detach()[:6].requires_grad_()

    def call(some):
        return token_logps(some, weight, targets()[:6], max_bytes=3 * 8 * V)

    assert plan_call(some, LmHead(weight), max_bytes=3 * 8 * V).hidden_rows > 0
    torch.autograd.gradcheck(call, some)
