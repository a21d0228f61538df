"""Loss, results and gradients of the KTO class are those of Liger's own."""

from __future__ import annotations

import pytest
import torch

from fastdaa.drop_in.liger import LigerFusedLinearKTOLoss

ROWS, WIDTH, HIDDEN, VOCAB = 5, 7, 6, 11
CHOSEN = torch.tensor([True, False, False, True, False])


def batch(bias=True, ignore_index=-100):
    """What ``forward`` takes, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    target = torch.full((ROWS, WIDTH), ignore_index)
    for row, (start, length) in enumerate(((1, 5), (4, 1), (0, 7), (5, 2), (1, 3))):
        tokens = torch.randint(max(ignore_index + 1, 0), VOCAB, (length,), generator=generator)
        target[row, start : start + length] = tokens
    return {
        "_input": normal(ROWS, WIDTH, HIDDEN), "lin_weight": normal(VOCAB, HIDDEN),
        "target": target, "bias": normal(VOCAB) if bias else None, "preference_labels": CHOSEN,
        "ref_input": normal(ROWS, WIDTH, HIDDEN + 1), "ref_weight": normal(VOCAB, HIDDEN + 1),
        "ref_bias": normal(VOCAB) if bias else None,
    }  # fmt: skip


def run(loss_class, call, **options):
    trained = [call[name] for name in ("_input", "lin_weight", "bias")]
    leaves = [None if t is None else t.clone().requires_grad_() for t in trained]
    call = call | dict(zip(("_input", "lin_weight", "bias"), leaves, strict=True))
    loss, results = loss_class(**options)(**call)
    (2.0 * loss).backward()
    return [loss, *results], [leaf.grad for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("kl", [None, 0.7], ids=["no-kl", "kl"])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("ref", [False, True], ids=["no-ref", "ref"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_kto(liger, kl, average, ref, bias, ignore_index):
    call = batch(bias, ignore_index) | {"kl": None if kl is None else torch.tensor([kl])}
    options = {
        "beta": 0.3, "use_ref_model": ref, "average_log_prob": average,
        "ignore_index": ignore_index,
    }  # fmt: skip
    expected, wanted = run(liger.LigerFusedLinearKTOLoss, call, compiled=False, **options)
    got, gradients = run(LigerFusedLinearKTOLoss, call, **options)
    assert len(got) == len(expected) == 7
    for i, (value, want) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(value, want, rtol=2e-5, atol=2e-5, msg=f"result {i}")
    for value, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-4, atol=2e-6)
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)


def by_hand(call, beta, kl):
    """The formula on full logits, in fp64."""
    logps = []
    for name, weight, bias in (
        ("_input", "lin_weight", "bias"),
        ("ref_input", "ref_weight", "ref_bias"),
    ):
        logits = call[name].double() @ call[weight].double().T + call[bias].double()
        target = call["target"]
        picked = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        logps.append((picked * (target != -100)).sum(dim=1))
    signed = torch.where(CHOSEN, 1.0, -1.0) * beta * (logps[0] - logps[1] - kl)
    return (1 - signed.sigmoid()).mean()


@pytest.mark.parametrize("kl", [0.0, 1.3, torch.tensor(1.3)], ids=["zero", "number", "tensor"])
def test_the_formula(kl):
    call = batch()
    loss, _ = LigerFusedLinearKTOLoss(use_ref_model=True)(**call, kl=kl)
    torch.testing.assert_close(loss.double(), by_hand(call, 0.1, float(kl)), rtol=1e-6, atol=1e-7)


def test_only_the_loss_has_a_gradient_and_none_goes_to_the_reference_or_the_baseline():
    call = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in batch().items()}
    kl = torch.tensor(0.5, requires_grad=True)
    loss, results = LigerFusedLinearKTOLoss(use_ref_model=True)(**call, kl=kl)
    assert not any(result.requires_grad for result in results)
    loss.backward()
    assert all(call[name].grad is not None for name in ("_input", "lin_weight", "bias"))
    assert all(call[name].grad is None for name in ("ref_input", "ref_weight", "ref_bias"))
    assert kl.grad is None


def test_a_broken_completion_spoils_the_sums_of_its_side_alone():
    call = batch()
    call["_input"][0] = torch.nan  # a chosen one
    _, results = LigerFusedLinearKTOLoss()(**call)
    assert [bool(result.isnan()) for result in results] == 3 * [True, False]


def test_an_empty_completion_has_a_mean_of_0():
    call = batch()
    call["target"][0] = -100
    loss, (chosen, *_) = LigerFusedLinearKTOLoss(average_log_prob=True)(**call)
    alone = call | {"preference_labels": torch.arange(ROWS) == 3}
    assert loss.isfinite()
    assert chosen == LigerFusedLinearKTOLoss(average_log_prob=True)(**alone)[1][0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"preference_labels": None}, TypeError, "preference_labels: .* bool .* got NoneType"),
        ({"preference_labels": CHOSEN.int()}, TypeError, "bool tensor, got torch.int32"),
        ({"preference_labels": CHOSEN[:3]}, ValueError, r"shape \[5\], one a row of target"),
        ({"kl": torch.zeros(ROWS)}, ValueError, r"kl: expected one number, got shape \[5\]"),
        ({"target": torch.zeros(0, WIDTH).long()}, ValueError, r"target: expected shape \[B, T\]"),
        ({"target": torch.zeros(ROWS, WIDTH)}, TypeError, "target: expected an int64 tensor"),
        ({"_input": torch.zeros(ROWS, 1, HIDDEN)}, ValueError, "_input: expected shape"),
        ({"ref_input": None}, ValueError, "ref_input: expected a tensor with use_ref_model=True"),
        ({"ref_weight": None}, ValueError, "ref_weight: expected a tensor with use_ref_model"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        LigerFusedLinearKTOLoss(use_ref_model=True)(**batch() | change)


def test_attributes_may_change_and_are_checked_again():
    loss, call = LigerFusedLinearKTOLoss(), batch()
    loss.beta = 0.4
    assert torch.equal(loss(**call)[0], LigerFusedLinearKTOLoss(beta=0.4)(**call)[0])
    assert "beta=0.4" in repr(loss) and "nll" not in repr(loss)
    loss.beta = 0.0
    with pytest.raises(ValueError, match="beta of kto"):
        loss(**call)
    with pytest.raises(ValueError, match="beta of kto"):
        LigerFusedLinearKTOLoss(beta=-0.1)


def test_a_compiled_loss_is_one_graph():
    module, graphs = LigerFusedLinearKTOLoss(use_ref_model=True), []
    call = batch()
    leaves = [call[name].requires_grad_() for name in ("_input", "lin_weight")]

    def loss(x, kl):
        return module(**call | {"_input": torch.tanh(x)}, kl=kl)[0]

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, backend=count)
    arguments = leaves[0], torch.tensor(0.3)
    want, got = (torch.autograd.grad(f(*arguments), leaves) for f in (loss, compiled))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert len(graphs) == 1
