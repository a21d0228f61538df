"""The single pass that keeps gradients of a part of the logits and computes the others again."""

from __future__ import annotations

import pytest
import torch
from kept_calls import (
    COUNTS,
    EVERYTHING,
    Linear,
    OneSign,
    V,
    check_wanted_alone,
    keep_at_most,
    relative,
    run,
    tensors,
    truth,
)

from fastdaa import LmHead, Objective, pair_loss, token_logps
from fastdaa.kept_logps import plan_kept
from fastdaa.single_pass import plan_loss
from fastdaa.single_pass_memory import SinglePassRoom

# What the interpreter's numpy says about masked -inf - -inf.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.interpreter,
]

N, EPS = sum(COUNTS), torch.finfo(torch.bfloat16).eps


@pytest.fixture
def in_part(monkeypatch, half_factors):
    """``in_part(columns)``: bf16 products, of whose gradients so many columns are kept."""

    def start(columns: int, tokens: int = N) -> None:
        half_factors(torch.bfloat16)
        keep_at_most(monkeypatch, 2 * tokens * columns)
        monkeypatch.setattr(SinglePassRoom, "_ways", lambda self: [(3.5, self.part(), "asked")])

    return start


def batch(dtype=torch.bfloat16, bias=False):
    """:func:`kept_calls.tensors`, with targets on both sides of the first 48 columns' end."""
    leaves, selection = tensors(dtype, bias=bias)
    selection.targets[:6] = torch.tensor([0, 47, 48, 49, 130, 47])
    return leaves, selection


@pytest.mark.parametrize("columns", [16, 48, 128])
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        pytest.param("torch", {}, id="torch"),
        pytest.param("torch", EVERYTHING, id="torch-everything"),
        pytest.param("triton", EVERYTHING, id="triton-everything"),
    ],
)
def test_losses_are_those_of_all_gradients_kept(half_factors, in_part, columns, engine, options):
    leaves, selection = batch(bias=bool(options))
    call = (leaves, selection, Objective.parse("dpo", beta=0.1))
    _, wide = truth(*call, options=options)
    half_factors(torch.bfloat16)
    whole, _ = run(*call, options=options, engine=engine, stats=True)
    in_part(columns)
    plan = plan_loss(leaves[0], LmHead(*leaves[1:]), engine=engine)
    assert (plan.kept_columns, plan.kept_tokens, plan.kept_whole) == (columns, N, True)
    assert plan.keeps_part and plan.gemms == pytest.approx(4 - columns / V)
    ours, grads = run(*call, options=options, engine=engine, stats=True)
    for name in ("loss", "losses", "token_logps"):
        assert torch.equal(getattr(ours, name), getattr(whole, name)), name
    assert all(torch.equal(a, b) for a, b in zip(ours.stats, whole.stats, strict=True))
    for leaf, got, want in zip([t for t in leaves if t is not None], grads, wide, strict=True):
        # The interpreter truncates to bf16, which does not average out.
        assert got.dtype == leaf.dtype and relative(got, want) < 2 * EPS


@pytest.mark.parametrize("peak", [1.0, 10.0, 40.0])
def test_gradients_are_as_good_as_those_of_materialised_logits(in_part, peak):
    """``(hidden @ weight.T).float()`` and autograd."""
    v, d, n = 3000, 96, 384
    weight = (torch.randn(v, d) * d**-0.5).bfloat16()
    targets, coefficients = torch.randint(v, (n,)), torch.randn(n)
    hidden = (weight[targets].float() * peak * 0.8 + torch.randn(n, d) * peak / 8).bfloat16()
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    logps = torch.log_softmax(wide[0] @ wide[1].T, -1).gather(1, targets[:, None])[:, 0]
    want = torch.autograd.grad((logps * coefficients).sum(), wide)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    logps = torch.log_softmax((leaves[0] @ leaves[1].T).float(), -1)
    logps = logps.gather(1, targets[:, None])[:, 0]
    usual = torch.autograd.grad((logps * coefficients).sum(), leaves)
    in_part(1280, n)
    assert plan_kept(leaves[0], LmHead(leaves[1])).kept_columns == 1280
    logps = token_logps(*leaves, targets, impl="single_pass")
    ours = torch.autograd.grad((logps * coefficients).sum(), leaves)
    for got, other, exact in zip(ours, usual, want, strict=True):
        assert relative(got, exact) <= relative(other, exact)


@pytest.mark.parametrize("mean", [0, 1, 3])
def test_targets_that_cancel_the_others(in_part, mean):
    problem = OneSign(mean)
    in_part(256, 2048)
    assert plan_kept(problem.hidden, LmHead(problem.weight)).kept_columns == 256
    problem.check(problem.gradients(lambda *call: token_logps(*call, impl="single_pass")))


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_without_a_coefficient_have_no_gradient(in_part, engine, sparse):
    leaves, selection = batch(bias=True)
    ref = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0])
    _, wide = truth(leaves, selection, Linear(), ref_logps=ref)
    in_part(48)
    _, grads = run(leaves, selection, Linear(sparse), ref_logps=ref, engine=engine)
    for got, want in zip(grads, wide, strict=True):
        assert relative(got, want) < 2 * EPS
    active = ref.repeat_interleave(selection.lengths) != 0
    assert (grads[0][~active] == 0).all() and grads[0][active].any(1).all()
    _, grads = run(leaves, selection, Linear(sparse), ref_logps=torch.zeros(8), engine=engine)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("name", ["kto", "aot"])
def test_losses_that_couple_the_batch_take_it_too(in_part, name):
    leaves, selection = batch()
    call = (leaves, selection, Objective.parse(name))
    _, wide = truth(*call)
    in_part(48)
    assert plan_loss(leaves[0], LmHead(leaves[1]), coupled=True).keeps_part
    _, grads = run(*call)
    assert all(relative(got, want) < 2 * EPS for got, want in zip(grads, wide, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_only_the_wanted_gradients_are_made(in_part, wanted):
    in_part(48)
    check_wanted_alone(*batch(bias=True), wanted)


def test_gradients_have_the_dtypes_of_their_batch(in_part):
    """As under autocast: fp32 tensors, products in half precision."""
    leaves, selection = batch(torch.float32, bias=True)
    call = (leaves, selection, Objective.parse("dpo"))
    _, wide = truth(*call)
    in_part(48)
    _, grads = run(*call)
    for got, want in zip(grads, wide, strict=True):
        assert got.dtype == torch.float32 and relative(got, want) < EPS


def test_the_caller_may_change_what_is_returned(in_part):
    in_part(48)
    leaves, selection = batch()
    call = {"ref_logps": torch.zeros(len(COUNTS)), "impl": "single_pass"}
    found = []
    for change in (False, True):
        out = pair_loss(leaves[0], LmHead(leaves[1]), selection, Objective.parse("dpo"), **call)
        if change:
            out.token_logps.zero_()
        found.append(torch.autograd.grad(out.loss, leaves[:2]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_loss_outside_the_call_may_run_backward_twice(in_part):
    leaves, selection = batch(bias=True)
    hidden, weight, bias = leaves
    wide = [t.detach().double().requires_grad_() for t in leaves]
    logps = token_logps(wide[0], wide[1], selection.targets, bias=wide[2], impl="reference")
    want = torch.autograd.grad(logps.exp().sum(), wide)
    in_part(48)
    assert plan_kept(hidden, LmHead(weight, bias)).keeps_part
    logps = token_logps(hidden, weight, selection.targets, bias=bias, impl="single_pass")
    loss = logps.exp().sum()
    logps.detach().zero_()  # the caller's own
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(relative(got, exact) < 3 * EPS for got, exact in zip(first, want, strict=True))


@pytest.mark.parametrize("name", ["dpo", "slic"])
def test_a_graph_of_a_compiler_makes_the_same(in_part, name):
    in_part(48)
    leaves, selection = batch(bias=True)
    objective = Objective.parse(name)

    def loss(*tensors):
        head = LmHead(*tensors[1:])
        ref = torch.linspace(-30, -5, len(COUNTS))
        return pair_loss(tensors[0], head, selection, objective, ref_logps=ref).loss

    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    grads = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
