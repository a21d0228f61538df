"""A loss of the caller's own, inside the head: values, gradients, cost, and what is refused."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import get_type_hints

import pytest
import torch
import torch.nn.functional as F
from device_memory import META, counted
from tile_budget import tiles_of

from fastdaa import FusedLinearPairLoss, LmHead, TokenSelection, custom_loss, pair_loss
from fastdaa.losses import Objective, dpo
from fastdaa.objective_kernel import has_kernel
from fastdaa.single_pass import plan_loss

COUNTS = (6, 4, 1, 3, 8, 2, 0, 5)
V, D = 61, 12


def own_dpo(policy, ref, *, beta=0.1):
    return -F.logsigmoid(beta * ((policy.chosen - ref.chosen) - (policy.rejected - ref.rejected)))


def centred(policy, ref, *, beta=0.1, power=2):
    """Coupled: every margin against the mean margin of the batch."""
    margins = beta * (policy.chosen - ref.chosen - policy.rejected + ref.rejected)
    return (margins - margins.mean() - 1).abs() ** power


def likelihood(policy, ref, *, totals, scale=1.0):
    """``sft``, times a number."""
    return -scale * policy.chosen * totals.pairs / max(totals.chosen_tokens, 1)


REF = torch.linspace(-30, -5, len(COUNTS), dtype=torch.float64)


def tensors(dtype=torch.float32):
    n = sum(COUNTS)
    hidden, weight = torch.randn(n, D), torch.randn(V, D) * 0.6
    lengths = torch.tensor(COUNTS)
    selection = TokenSelection(torch.arange(n), torch.randint(V, (n,)), lengths, COUNTS)
    return [t.to(dtype).requires_grad_() for t in (hidden, weight)], selection


def run(leaves, selection, objective, **call):
    copies = [t.detach().clone().requires_grad_() for t in leaves]
    out = pair_loss(
        copies[0], LmHead(copies[1]), selection, objective, ref_logps=REF.to(leaves[0].dtype),
        **call,
    )  # fmt: skip
    return out, torch.autograd.grad(out.loss, copies)


@pytest.mark.parametrize("impl", ["single_pass", "recompute", "reference"])
def test_the_same_formula_gives_the_same_bits(impl):
    leaves, selection = tensors()
    own = Objective.parse(custom_loss(own_dpo, coupled=False), beta=0.3)
    ours, grads = run(leaves, selection, own, impl=impl)
    theirs, wanted = run(leaves, selection, Objective.parse("dpo", beta=0.3), impl=impl)
    assert torch.equal(ours.losses, theirs.losses) and ours.loss > 0
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


CASES = {
    "alone": ("single_pass", [custom_loss(own_dpo, coupled=False)]),
    "coupled": ("auto", [custom_loss(centred)]),
    "mixture": ("auto", [custom_loss(own_dpo, coupled=False), "sft", custom_loss(centred)]),
}


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_in_fp64(case):
    impl, losses = CASES[case]
    leaves, selection = tensors(torch.float64)
    objective = Objective.parse(losses, weights=[0.7, 0.2, 1.1][: len(losses)], beta=0.3)

    def loss(hidden, weight):
        head = LmHead(weight)
        return pair_loss(hidden, head, selection, objective, ref_logps=REF, impl=impl).loss

    # Fast mode: against random directions.
    assert torch.autograd.gradcheck(loss, tuple(leaves), fast_mode=True)


def test_chunks_add_up_to_the_batch():
    leaves, selection = tensors(torch.float64)
    objective = Objective.parse(
        [custom_loss(own_dpo, coupled=False), custom_loss(likelihood, coupled=False)], beta=0.3
    )
    with tiles_of(9, 2 * V):  # fp64
        plan = plan_loss(leaves[0], LmHead(leaves[1]), impl="single_pass")
        assert plan.chunk_tokens < sum(COUNTS) / 2
        ours, grads = run(leaves, selection, objective, impl="single_pass")
    whole, wanted = run(leaves, selection, Objective.parse(["dpo", "sft"], beta=0.3))
    torch.testing.assert_close(ours.losses, whole.losses)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("dtype", "coupled", "units"),
    [
        pytest.param(torch.float32, False, 3, id="fp32"),
        pytest.param(torch.float32, True, 4, id="fp32-coupled"),
        pytest.param(torch.bfloat16, False, 3, id="bf16"),
        pytest.param(torch.bfloat16, True, 3, id="bf16-coupled"),
    ],
)
def test_products_on_a_gpu(dtype, coupled, units):
    """A loss that couples the batch costs 3U, too, where gradients of logits are kept."""
    n, v, d, counts = 1024, 32000, 256, (256,) * 4
    objective = Objective.parse(custom_loss(centred if coupled else own_dpo, coupled=coupled))
    with counted() as held:
        hidden = torch.empty(n, d, dtype=dtype, device=META, requires_grad=True)
        weight = torch.empty(v, d, dtype=dtype, device=META, requires_grad=True)
        rows, targets = (torch.empty(n, dtype=torch.int64, device=META) for _ in range(2))
        lengths = torch.empty(4, dtype=torch.int64, device=META)
        selection = TokenSelection(rows, targets, lengths, counts)
        ref = torch.empty(4, device=META)
        held.restart()
        pair_loss(hidden, LmHead(weight), selection, objective, ref_logps=ref).loss.backward()
    assert held.flop == units * 2 * n * v * d


def test_modules_take_it():
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 5, 6, -100]])
    hidden, weight = torch.randn(2, 4, D), torch.randn(V, D)
    own, ours = (
        FusedLinearPairLoss(loss, beta=0.3)(hidden, weight, labels, ref_logps=torch.zeros(2)).loss
        for loss in (custom_loss(own_dpo), "dpo")
    )
    assert torch.equal(own, ours)


def test_hyperparameters_and_names():
    objective = Objective.parse([custom_loss(own_dpo), "ipo"], weights=[1, 0.5], beta=0.2)
    assert str(objective).startswith("own_dpo(beta=0.2) + 0.5 * ipo(beta=0.2, ")
    assert objective.beta == 0.2 and objective.needs_ref and objective.coupled
    assert not Objective.parse(custom_loss(own_dpo, coupled=False)).coupled
    assert not Objective.parse(custom_loss(likelihood, needs_ref=False)).needs_ref
    assert Objective.parse(custom_loss(own_dpo, sparse=True)).sparse
    assert str(Objective.parse(custom_loss(likelihood, name="nll"))) == "nll(scale=1.0)"
    # Ranges are those of the library's losses: -1 may mean something here.
    assert Objective.parse(custom_loss(centred), power=-1).terms[0].values["power"] == -1
    with pytest.raises(ValueError, match="power of centred to be a finite number, got 'two'"):
        Objective.parse(custom_loss(centred), power="two")
    with pytest.raises(ValueError, match="got gamma=1, which no chosen loss uses: own_dpo takes"):
        Objective.parse(custom_loss(own_dpo), gamma=1)
    with pytest.raises(ValueError, match=r"weights: expected one a loss \(own_dpo\), got 2"):
        Objective.parse(custom_loss(own_dpo), weights=[1, 2])


def test_functions_of_one_name_are_kept_apart():
    """Compiled graphs find an objective by its key."""
    first, second = (
        Objective.parse(custom_loss(fn, name="mine")) for fn in (own_dpo, lambda policy, ref: -1)
    )
    assert str(first) != str(second) and first.key != second.key
    again = Objective.parse(custom_loss(own_dpo, name="mine"))
    assert Objective.by_key(first.key) is first and Objective.by_key(again.key) is again


def test_a_registered_function_is_let_go():
    """A sweep over functions does not keep all of them."""
    objective = Objective.parse(custom_loss(own_dpo))
    key, gone = objective.key, weakref.ref(objective)
    del objective
    gc.collect()
    assert gone() is None
    with pytest.raises(KeyError):
        Objective.by_key(key)


def test_equal_objectives_are_one_key_of_a_dict():
    assert len({Objective.parse("dpo"), Objective.parse("dpo"), Objective.parse("ipo")}) == 2


def test_it_travels_between_processes():
    objective = Objective.parse([custom_loss(own_dpo), "sft"], beta=0.4)
    assert pickle.loads(pickle.dumps(objective)) == objective


def test_there_is_no_kernel_for_it():
    assert not has_kernel(Objective.parse(["dpo", custom_loss(own_dpo, coupled=False)]))
    assert has_kernel(Objective.parse(["dpo", "cdpo"]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(
            lambda: custom_loss(dpo), ValueError,
            "name: expected one that no loss of the library has, got 'dpo'", id="name",
        ),
        pytest.param(
            lambda: custom_loss(lambda policy, *, beta=0.1: policy, name="mine"), TypeError,
            r"fn: expected mine\(policy, ref, \*, .* got mine\(policy, \*?,? ?beta=0.1\)",
            id="no-reference",
        ),
        pytest.param(
            lambda: custom_loss(lambda policy, ref, beta=0.1: policy, name="mine"), TypeError,
            "fn: expected mine", id="positional",
        ),
        pytest.param(
            lambda: custom_loss(lambda policy, ref, **options: policy, name="mine"), TypeError,
            "fn: expected mine", id="any-options",
        ),
        pytest.param(
            lambda: custom_loss(lambda policy, ref, *, beta: policy, name="mine"), TypeError,
            "fn: expected mine.*numbers, True or False; beta has none", id="no-default",
        ),
        pytest.param(
            lambda: custom_loss(3, name="mine"), TypeError, "fn: expected mine.* got 3", id="number"
        ),
    ],
)  # fmt: skip
def test_what_is_no_loss_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_mean_over_the_batch_is_refused():
    """It would be taken for the loss of every pair."""
    leaves, selection = tensors()
    mean = custom_loss(lambda policy, ref: own_dpo(policy, ref).mean(), name="mine")
    with pytest.raises(ValueError, match=r"mine: expected one loss a pair, \[4\], got \[\]"):
        run(leaves, selection, Objective.parse(mean))


@pytest.mark.parametrize("given", [1.0, None, ()], ids=["number", "none", "tuple"])
def test_a_loss_that_is_no_tensor_is_named(given):
    leaves, selection = tensors()
    objective = Objective.parse(custom_loss(lambda policy, ref: given, name="mine"))
    expected = f"mine: expected a tensor with one loss a pair, got {type(given).__name__}"
    with pytest.raises(TypeError, match=expected):
        run(leaves, selection, objective)


def test_modules_are_annotated_to_take_what_objectives_take():
    """Or a type checker refuses ``FusedLinearPairLoss(custom_loss(...))``."""
    ours, theirs = (get_type_hints(f) for f in (FusedLinearPairLoss.__init__, Objective.parse))
    assert (ours["loss"], ours["weights"]) == (theirs["losses"], theirs["weights"])


def test_a_missing_reference_is_named():
    leaves, selection = tensors()
    with pytest.raises(ValueError, match=r"ref_logps: expected \[8\] for own_dpo"):
        pair_loss(leaves[0], LmHead(leaves[1]), selection, Objective.parse(custom_loss(own_dpo)))
