"""Loss, results and gradients of the drop-in classes are those of Liger's own."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys

import pytest
import torch
from head_products import HeadProducts

from fastdaa.drop_in import liger as ours

PAIRS, WIDTH, HIDDEN, VOCAB = 3, 7, 5, 11
NAMES = [name for name in ours.__all__ if name.startswith("Liger")]
# How many tokens of each row are scored, after how many that are not.
LENGTHS = [5, 1, 6, 2, 6, 3]
STARTS = [1, 4, 0, 5, 1, 2]


def batch(ignore_index, bias, seed=0):
    """Weights, hidden states, targets and bias, and the same of a reference of another width."""
    torch.manual_seed(seed)
    target = torch.full((2 * PAIRS, WIDTH), ignore_index)
    # An ignore_index that is a token id, as a pad token is, is no target.
    lowest = ignore_index + 1 if ignore_index >= 0 else 0
    for row, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        target[row, start : start + length] = torch.randint(lowest, VOCAB, (length,))
    policy = [torch.randn(VOCAB, HIDDEN), torch.randn(2 * PAIRS, WIDTH, HIDDEN)]
    ref = [torch.randn(2 * PAIRS, WIDTH, HIDDEN + 1), torch.randn(VOCAB, HIDDEN + 1)]
    biases = [torch.randn(VOCAB) if bias else None for _ in range(2)]
    return policy, target, biases, ref


def run(loss_class, policy, target, biases, rest=(), factor=2.0, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in policy]
    bias = None if biases[0] is None else biases[0].clone().requires_grad_()
    loss, results = loss_class(**options)(*leaves, target, bias, *rest)
    (factor * loss).backward()
    gradients = [leaf.grad for leaf in [*leaves, *([] if bias is None else [bias])]]
    return [loss, *results], gradients


def compare(liger, name, *, bias=False, ignore_index=-100, ref=False, nll_target=None, **options):
    policy, target, biases, (ref_input, ref_weight) = batch(ignore_index, bias)
    rest = (ref_input, ref_weight, biases[1]) if ref else ()
    if nll_target is not None:
        rest = (nll_target,)
    call = policy, target, biases, rest
    options = {"ignore_index": ignore_index, **options}
    expected, expected_gradients = run(getattr(liger, name), *call, compiled=False, **options)
    got, gradients = run(getattr(ours, name), *call, **options)
    assert len(got) == len(expected)
    for i, (value, wanted) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(value, wanted, rtol=2e-5, atol=2e-6, msg=f"result {i}")
    for value, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=2e-6)
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_liger(liger, name):
    for method in ("__init__", "forward"):
        mine = inspect.signature(getattr(getattr(ours, name), method)).parameters
        theirs = inspect.signature(getattr(getattr(liger, name), method)).parameters
        assert list(mine) == list(theirs)
        assert [p.default for p in mine.values()] == [p.default for p in theirs.values()]


DPO_TYPES = {
    "sigmoid": {"label_smoothing": 0.2},  # which it does not read
    "hinge": {},
    "exo_pair": {"label_smoothing": 0.2},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.2},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.4},
}


def test_every_loss_type_of_liger_is_there(liger):
    theirs = liger.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES
    assert set(DPO_TYPES) == theirs == set(ours.LigerFusedLinearDPOLoss._LOSS_TYPES)


@pytest.mark.parametrize("ref", [True, False], ids=["ref", "no-ref"])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_dpo(liger, loss_type, average, ref):
    compare(
        liger, "LigerFusedLinearDPOLoss", bias=True, ref=ref, use_ref_model=ref, beta=0.3,
        loss_type=loss_type, average_log_prob=average, **DPO_TYPES[loss_type],
    )  # fmt: skip


@pytest.mark.parametrize("ignore_index", [-100, -1, 0])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
def test_dpo_with_likelihood(liger, average, bias, ignore_index):
    compare(
        liger, "LigerFusedLinearDPOLoss", bias=bias, ignore_index=ignore_index, ref=True,
        compute_nll_loss=True, alpha=0.7, average_log_prob=average,
    )  # fmt: skip


REFERENCE_FREE = {
    "cpo": ("LigerFusedLinearCPOLoss", {}),
    "cpo-mean": ("LigerFusedLinearCPOLoss", {"average_log_prob": True, "label_smoothing": 0.1}),
    "cpo-no-nll": ("LigerFusedLinearCPOLoss", {"compute_nll_loss": False, "label_smoothing": 0.2}),
    "cpo-alpha": ("LigerFusedLinearCPOLoss", {"alpha": 0.3, "beta": 0.7, "bias": True}),
    "simpo": ("LigerFusedLinearSimPOLoss", {}),
    "simpo-no-nll": ("LigerFusedLinearSimPOLoss", {"compute_nll_loss": False, "beta": 2.0}),
    "simpo-bias": (
        "LigerFusedLinearSimPOLoss",
        {"gamma": 1.2, "label_smoothing": 0.2, "alpha": 0.4, "bias": True, "ignore_index": -1},
    ),
    "orpo": ("LigerFusedLinearORPOLoss", {}),
    "orpo-no-nll": ("LigerFusedLinearORPOLoss", {"compute_nll_loss": False, "beta": 0.5}),
    "orpo-bias": ("LigerFusedLinearORPOLoss", {"bias": True, "ignore_index": 0}),
}


@pytest.mark.parametrize("case", REFERENCE_FREE)
def test_reference_free(liger, case):
    name, options = REFERENCE_FREE[case]
    compare(liger, name, **options)


@pytest.mark.parametrize("compute", [True, False], ids=["nll", "no-nll"])
def test_orpo_with_likelihood_of_other_tokens(liger, compute):
    torch.manual_seed(1)
    nll_target = torch.randint(0, VOCAB, (2 * PAIRS, WIDTH))
    nll_target[:, -2:] = -100
    compare(
        liger,
        "LigerFusedLinearORPOLoss",
        nll_target=nll_target,
        compute_nll_loss=compute,
        bias=True,
    )


def test_chunks_change_nothing(liger):
    compare(liger, "LigerFusedLinearDPOLoss", ref=True, chunk_size=3)


def test_without_gradient(liger):
    policy, target, biases, ref = batch(-100, True)
    call = *policy, target, biases[0], *ref, biases[1]
    with torch.no_grad():
        expected, theirs = liger.LigerFusedLinearDPOLoss(compiled=False)(*call)
        loss, mine = ours.LigerFusedLinearDPOLoss()(*call)
    torch.testing.assert_close([loss, *mine], [expected, *theirs], rtol=2e-5, atol=2e-6)
    assert not loss.requires_grad


def test_dpo_by_hand():
    """Two tokens, logits (0, ln 3): log-probs -ln 4 and ln 3/4; the reference is uniform."""
    weight = torch.tensor([[0.0], [1.0]])
    hidden = torch.full((2, 1, 1), math.log(3))
    target = torch.tensor([[1], [0]])
    loss, (chosen, rejected, chosen_logit, _, nll, good, bad) = ours.LigerFusedLinearDPOLoss(
        beta=1.0, compute_nll_loss=True, alpha=2.0
    )(weight, hidden, target, None, torch.zeros(2, 1, 1), weight)
    # margin ln 3: -log sigmoid = ln(4/3); likelihood -ln(3/4) = ln(4/3), twice.
    assert loss.item() == pytest.approx(3 * math.log(4 / 3), rel=1e-6)
    assert chosen.item() == pytest.approx(math.log(3 / 4), rel=1e-6)
    assert rejected.item() == pytest.approx(-math.log(4), rel=1e-6)
    assert chosen_logit.item() == pytest.approx(math.log(3) / 2, rel=1e-6)
    assert nll.item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert good.item() == pytest.approx(math.log(1.5), rel=1e-6)
    assert bad.item() == pytest.approx(-math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        pytest.param(
            ours.LigerFusedLinearDPOLoss,
            {"average_log_prob": True, "use_ref_model": False},
            id="dpo-means",
        ),
        pytest.param(ours.LigerFusedLinearDPOLoss, {"use_ref_model": False}, id="dpo-sums"),
        pytest.param(ours.LigerFusedLinearORPOLoss, {"compute_nll_loss": False}, id="orpo"),
    ],
)
def test_a_trained_head_costs_three_products(loss, options):
    """Counted; logits computed again would make it four."""
    tokens, d, v = 64, 16, 512
    weight = torch.randn(v, d, requires_grad=True)
    hidden = torch.randn(4, tokens // 4, d, requires_grad=True)
    with HeadProducts(v) as counter:
        value, _ = loss(**options)(weight, hidden, torch.randint(v, hidden.shape[:2]))
        value.backward()
    assert counter.flop / (2 * tokens * v * d) == pytest.approx(3, abs=0.3)


def test_bf16_inputs_keep_fp32_results():
    policy, target, _, _ = batch(-100, False)
    weight, hidden = (tensor.bfloat16() for tensor in policy)
    loss, results = ours.LigerFusedLinearCPOLoss()(weight, hidden, target)
    wide, expected = ours.LigerFusedLinearCPOLoss()(weight.float(), hidden.float(), target)
    assert {loss.dtype, *(result.dtype for result in results)} == {torch.float32}
    torch.testing.assert_close([loss, *results], [wide, *expected], rtol=1e-5, atol=1e-6)


def test_autocast_does_not_round_results():
    policy, target, biases, (ref_input, ref_weight) = batch(-100, True)
    call = (*policy, target, biases[0], ref_input, ref_weight)
    expected, wanted = ours.LigerFusedLinearDPOLoss()(*call)
    with torch.autocast("cpu", torch.bfloat16):
        loss, results = ours.LigerFusedLinearDPOLoss()(*call)
    assert {result.dtype for result in results} == {torch.float32}
    torch.testing.assert_close([loss, *results], [expected, *wanted])


def test_a_loss_type_set_later_is_checked_too():
    policy, target, _, (ref_input, ref_weight) = batch(-100, False)
    loss = ours.LigerFusedLinearDPOLoss()
    loss.loss_type = "ipo"  # one that fastdaa has, and Liger's DPO has not
    with pytest.raises(ValueError, match=r"loss_type: expected one of .* got 'ipo'"):
        loss(*policy, target, None, ref_input, ref_weight)


@pytest.mark.parametrize(
    ("nll_target", "error", "message"),
    [
        (torch.zeros(6, WIDTH - 1).long(), ValueError, "nll_target: expected shape"),
        (torch.zeros(6, WIDTH), TypeError, "nll_target: expected an int64 tensor"),
    ],
    ids=["shape", "dtype"],
)
def test_targets_of_the_likelihood_are_named(nll_target, error, message):
    policy, target, _, _ = batch(-100, False)
    with pytest.raises(error, match=message):
        ours.LigerFusedLinearORPOLoss()(*policy, target, None, nll_target)


def test_an_ignore_index_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="ignore_index: expected an integer, got None"):
        ours.LigerFusedLinearORPOLoss(ignore_index=None)


def test_an_empty_completion_counts_as_zero():
    policy, target, _, _ = batch(-100, False)
    target[PAIRS] = -100
    loss, results = ours.LigerFusedLinearSimPOLoss()(*policy, target)
    assert torch.isfinite(loss) and results[1][0] == 0


def test_attributes_may_change_between_calls():
    policy, target, _, _ = batch(-100, False)
    loss = ours.LigerFusedLinearCPOLoss(beta=0.1)
    loss.beta = 0.4
    expected, _ = ours.LigerFusedLinearCPOLoss(beta=0.4)(*policy, target)
    assert torch.equal(loss(*policy, target)[0], expected)
    assert "beta=0.4" in repr(loss)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DPO", {"loss_type": "ipo"}, "loss_type: expected one of 'sigmoid', .* got 'ipo'"),
        ("DPO", {"beta": 0.0}, "beta of dpo"),
        ("DPO", {"loss_type": "exo_pair"}, "label_smoothing of exo_pair"),
        ("DPO", {"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing of robust"),
        ("CPO", {"label_smoothing": 0.6}, "label_smoothing of cpo"),
        ("CPO", {"alpha": -1.0}, "weight >= 0"),
        ("SimPO", {"gamma": -0.1}, "gamma of simpo"),
        ("ORPO", {"beta": -1.0}, "beta of orpo"),
    ],
)
def test_values_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(ours, f"LigerFusedLinear{name}Loss")(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(3, WIDTH, dtype=torch.int64)}, ValueError, r"target: .*2B"),
        ({"target": torch.zeros(6, WIDTH)}, TypeError, "target: expected an int64 tensor"),
        ({"target": torch.full((6, WIDTH), VOCAB)}, ValueError, "token ids from 0 to 10"),
        ({"_input": torch.zeros(6, WIDTH - 1, HIDDEN)}, ValueError, "_input: expected shape"),
        ({"bias": torch.zeros(VOCAB + 1)}, ValueError, "bias: expected shape"),
        ({"ref_input": None}, ValueError, "ref_input: expected a tensor with use_ref_model=True"),
        ({"ref_weight": None}, ValueError, "ref_weight: expected a tensor with use_ref_model=True"),
        ({"ref_input": torch.zeros(6, 1, HIDDEN)}, ValueError, "ref_input: expected shape"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(change, error, message):
    policy, target, biases, ref = batch(-100, True)
    call = {
        "lin_weight": policy[0], "_input": policy[1], "target": target, "bias": biases[0],
        "ref_input": ref[0], "ref_weight": ref[1],
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ours.LigerFusedLinearDPOLoss()(**{**call, **change})


def test_neither_liger_nor_trl_is_imported():
    code = (
        "import sys, fastdaa.drop_in.liger\n"
        "print(sorted({'liger_kernel', 'transformers', 'trl', 'triton'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize(
    "name", ["LigerFusedLinearDPOLoss", "LigerFusedLinearCPOLoss", "LigerFusedLinearORPOLoss"]
)
def test_a_compiled_loss_is_one_graph(name):
    """As it comes, without ``fullgraph``; the numbers are those without a compiler."""
    module, graphs = getattr(ours, name)(), []
    weight = torch.randn(33, 8, requires_grad=True)

    def loss(x, target, ref_weight):
        ref = {"ref_input": x.detach(), "ref_weight": ref_weight} if "DPO" in name else {}
        return module(weight, torch.tanh(x), target, **ref)[0]

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, backend=count)
    x, target = torch.randn(4, 6, 8, requires_grad=True), torch.randint(0, 33, (4, 6))
    target[:, :2] = -100
    call = (x, target, torch.randn(33, 8))
    want, got = (torch.autograd.grad(f(*call), (x, weight)) for f in (loss, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)) and len(graphs) == 1
