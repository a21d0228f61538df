"""The gradient of the hidden states a block of rows at a time, where memory is scarce."""

from __future__ import annotations

import pytest
import torch
from head_products import HeadProducts

from fastdaa import (
    LmHead,
    Objective,
    TokenSelection,
    pair_loss,
    plan_head,
    token_entropy,
    token_logps,
)
from fastdaa.call_size import CallSize
from fastdaa.memory import Room
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
    ids = targets()[:SOME]

    def some(head_grad):
        hidden, weight = leaves(dtype, head_grad)
        return hidden.detach()[:SOME].requires_grad_(), weight

    def call(hidden, weight, **options):
        return token_logps(hidden, weight, ids, softcap=9.0, **options).sin().sum()

    truths = gradients(call, [t.detach().double().requires_grad_() for t in some(True)])
    half_factors(dtype)

    def errors(head_grad, **options):
        found = gradients(call, some(head_grad), engine=engine, **options)
        return [(g.double() - t).norm() / t.norm() for g, t in zip(found, truths, strict=False)]

    scarce = errors(head_grad, max_bytes=FEW, impl="recompute")
    assert len(scarce) == 1 + head_grad
    for ours, plenty in zip(scarce, errors(True, impl="recompute"), strict=False):
        assert ours <= 1.1 * plenty + 1e-4 and ours < 5e-3


@pytest.mark.parametrize("few", [{}, {"max_bytes": FEW}], ids=["plenty", "scarce"])
def test_the_gradient_of_a_bias_has_its_true_size_in_fp16(half_factors, few):
    """Tiles are scaled up into the range of fp16, and the scale is taken out again."""
    made = [t.detach().requires_grad_() for t in leaves(torch.float16, True, bias=True)]
    wide = [t.detach().double().requires_grad_() for t in made]

    def call(hidden, weight, bias, **options):
        options |= {"bias": bias, "impl": "recompute", "logit_scale": -1.5}
        return 1e-4 * token_logps(hidden, weight, targets(), **options).sum()

    truth = gradients(call, wide)
    half_factors(torch.float16)
    for got, want in zip(gradients(call, made, **few), truth, strict=True):
        assert (got.double() - want).norm() <= 1e-2 * want.norm()


def test_what_a_frozen_head_needs_is_said_and_true():
    made = leaves(torch.float32, head_grad=False)
    with pytest.raises(ValueError, match=r"expected (\d+) or more for impl='frozen'") as refusal:
        logps(*made, impl="frozen", max_bytes=FEW)
    least = int(str(refusal.value).split("expected ")[1].split()[0])
    logps(*made, impl="frozen", max_bytes=least).backward()
    with pytest.raises(ValueError, match="for impl='frozen'"):
        logps(*made, impl="frozen", max_bytes=least - 1)


@pytest.mark.parametrize(
    ("dtype", "head_grad", "gemms"),
    [
        pytest.param(torch.bfloat16, False, 3, id="bf16-frozen"),
        pytest.param(torch.bfloat16, True, 4, id="bf16"),
        pytest.param(torch.float16, False, 3, id="fp16-frozen"),
        pytest.param(torch.float16, True, 5, id="fp16"),
    ],
)
def test_the_plan_says_the_cost(dtype, head_grad, gemms):
    plan = plan_head(
        128256, "cuda", hidden_grad=True, head_grad=head_grad, engine="torch", tokens=65536,
        hidden_size=4096, operand=dtype, max_bytes=300 << 20,
    )  # fmt: skip
    assert (plan.path, plan.gemms) == ("recompute", gemms)
    # The sum of a bf16 gradient needs no memory but the gradient's.
    assert (plan.packs_sum, plan.hidden_rows) == ((True, 0) if gemms == 4 else (False, 2048))
    assert plan.extra_bytes <= 300 << 20
    said = plan.explain()
    assert f"recompute ({gemms}U" in said
    apart = "gradient of the hidden states apart, 2048 tokens at a time" in said
    assert apart == (gemms == 5)
    if not head_grad:
        size = 512 if dtype == torch.bfloat16 else 1024
        assert f"gradients of {size} MiB would be kept, more than max_bytes allows" in said


def test_gradients_pass_gradcheck():
    hidden, weight = leaves(torch.float64, head_grad=False)
    some = hidden.detach()[:6].requires_grad_()

    def call(some):
        return token_logps(some, weight, targets()[:6], max_bytes=3 * 8 * V)

    assert plan_call(some, LmHead(weight), max_bytes=3 * 8 * V).hidden_rows > 0
    torch.autograd.gradcheck(call, some)


def plan_of_scarce_memory(vocab_size, **options):
    return plan_head(
        vocab_size, "cuda", hidden_grad=True, engine="torch", operand=torch.bfloat16, **options
    )


def test_wide_sums_take_a_quarter_and_tiles_no_more_than_the_vocabulary():
    call = {"head_grad": True, "impl": "recompute", "max_bytes": 16 << 20}
    plan = plan_of_scarce_memory(128256, tokens=512, hidden_size=16384, **call)
    assert plan.hidden_rows == (4 << 20) // (4 * 16384)
    plan = plan_of_scarce_memory(500, tokens=8192, hidden_size=4096, **call)
    assert plan.hidden_rows and plan.hidden_columns == 500


def test_a_single_pass_without_a_gradient_of_the_head_costs_two_products():
    plan = plan_of_scarce_memory(
        50304, head_grad=False, loss_inside=True, impl="single_pass", tokens=512, hidden_size=64
    )
    assert (plan.path, plan.gemms) == ("single_pass", 2)


@pytest.mark.parametrize("call", [logps, entropies])
def test_tokens_of_coefficient_0_are_left_out_of_products(call):
    made, kept = leaves(torch.float64, head_grad=True), torch.arange(0, N, 4)

    def value(hidden, weight, rows):
        values = (
            token_entropy(hidden[rows], weight)
            if call is entropies
            else token_logps(hidden[rows], weight, targets()[rows], impl="recompute")
        )
        coefficients = torch.zeros(N, dtype=torch.float64).index_fill_(0, kept, 1.0)[rows]
        return (coefficients * values).sum()

    whole = value(*made, torch.arange(N))
    with HeadProducts(V) as products:
        found = torch.autograd.grad(whole, made)
    # Logits again and both gradients, of a quarter of the tokens.
    assert products.flop == 3 * 2 * len(kept) * V * D
    for got, want in zip(found, torch.autograd.grad(value(*made, kept), made), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_the_least_budget_of_a_frozen_head_is_rounded_up():
    call = {"head_grad": False, "tokens": 1001, "hidden_size": 4097}
    least = -(-16 * 2 * 1001 * 4097 // 15)
    assert 16 * 2 * 1001 * 4097 % 15
    with pytest.raises(ValueError, match=f"expected {least} or more for impl='frozen'"):
        plan_of_scarce_memory(1000, impl="frozen", max_bytes=least - 1, **call)
    assert plan_of_scarce_memory(1000, impl="frozen", max_bytes=least, **call).path == "frozen"


def test_divergences_keep_their_slopes_whatever_the_budget():
    call = {"head_grad": False, "tokens": 8192, "hidden_size": 4096, "max_bytes": 16 << 20}
    assert plan_of_scarce_memory(1000, divergence=True, **call).path == "frozen"
    assert plan_of_scarce_memory(1000, **call).path == "recompute"


def test_tiles_take_what_sums_leave_or_a_quarter():
    room = Room(CallSize(1000), "torch", on_cpu=False, max_bytes=16000)
    assert [room.beside(sums, 9000) for sums in (0, 10000, 15000)] == [9000, 6000, 1000]
    assert [room.beside(sums, 9000) for sums in (15001, 20000)] == [4000, 4000]
