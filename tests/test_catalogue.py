"""Known failures of fused heads, one test a failure. The numbers are those of our survey of peers.

13, 14, 15, 18, 19 and 22 are in ``test_catalogue_around.py``. TF32 in fp32 products (12), which
needs a GPU, is the caller's choice, see docs/head.md.

Products of half-precision factors with fp32 results exist on GPUs only; the fixture
``half_factors`` is an exact model of them.
"""

from __future__ import annotations

import math

import pytest
import torch
from tile_budget import tiles_of

from fastdaa import (
    LOSSES,
    LmHead,
    Objective,
    PairLogps,
    TokenSelection,
    pair_loss,
    reference,
    select_pairs,
    sequence_logps,
    token_logps,
)

PATHS = ("score", "frozen", "recompute")
TRAINED = ("frozen", "recompute")


def leaf(tensor, dtype=None, grad=True):
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(grad)


def gradients(path, hidden, weight, targets, coefficients, **options):
    """Log-probs and gradients ``[hidden, weight or None]`` of the weighted sum of log-probs."""
    hidden, weight = leaf(hidden), leaf(weight, grad=path != "frozen")
    logps = (
        reference.token_logps(hidden, weight, targets, **options)
        if path == "truth"
        else token_logps(hidden, weight, targets, impl=path, **options)
    )
    (logps * coefficients.to(logps.dtype)).sum().backward()
    return logps.detach(), hidden.grad, weight.grad


def truth(hidden, weight, targets, coefficients, **options):
    return gradients("truth", hidden.double(), weight.double(), targets, coefficients, **options)


def relative(got, expected) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def pairs(counts, dtype=torch.float32, v=67, d=16):
    n = sum(counts)
    selection = TokenSelection(
        torch.arange(n), torch.randint(v, (n,)), torch.tensor(counts), tuple(counts)
    )
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(v, d) * 0.5).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), selection


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("v", [4095, 4096, 4097, 8191, 8193])
def test_01_a_vocabulary_that_no_tile_divides(path, v):
    hidden, weight, targets = torch.randn(9, 8), torch.randn(v, 8), torch.randint(v, (9,))
    targets[-1] = v - 1
    logps = token_logps(leaf(hidden, grad=path != "score"), weight, targets, impl=path)
    expected = reference.token_logps(hidden.double(), weight.double(), targets)
    assert (logps <= 0).all()
    torch.testing.assert_close(logps.detach().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", TRAINED)
def test_02_every_token_has_its_own_upstream_gradient(path):
    data = torch.randn(40, 8), torch.randn(50, 8), torch.randint(50, (40,))
    coefficients = torch.logspace(-3, 3, 40) * torch.tensor([1.0, -1.0]).repeat(20)
    got = gradients(path, *data, coefficients, max_bytes=4 * 50 * 7)
    expected = truth(*data, coefficients)
    assert relative(got[1], expected[1]) < 1e-5
    rows = (got[1].double() - expected[1]).norm(dim=1) / expected[1].norm(dim=1)
    assert rows.max() < 1e-4  # also where the coefficient is small
    if path == "recompute":
        assert relative(got[2], expected[2]) < 1e-5


def test_03_what_carries_no_gradient_says_so():
    hidden, weight, selection = pairs((3, 4))
    out = pair_loss(hidden, LmHead(weight), selection, Objective.parse("simpo"), stats=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.policy.chosen.sum().backward()
    assert not any(t.requires_grad for t in (*out.policy, out.token_logps, out.losses, *out.stats))


@pytest.mark.parametrize("path", [*TRAINED, "single_pass"])
def test_04_backward_runs_twice_with_the_same_result(path):
    hidden, weight, selection = pairs((3, 4, 2, 2))
    weight.requires_grad_(path != "frozen")
    loss = pair_loss(
        hidden, LmHead(weight), selection, Objective.parse("simpo"), impl=path
    ).loss  # fmt: skip
    loss.backward(retain_graph=True)
    first, hidden.grad = hidden.grad, None
    loss.backward()
    assert torch.equal(hidden.grad, first)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.coupled])
def test_05_empty_completions_and_empty_batches_are_finite(name):
    for counts in ((4, 0, 0, 3), (0, 0, 0, 0)):
        hidden, weight, selection = pairs(counts)
        out = pair_loss(
            hidden, LmHead(weight), selection, Objective.parse(name),
            ref_token_logps=torch.zeros(sum(counts)),
        )  # fmt: skip
        out.loss.backward()
        assert out.losses.isfinite().all()
        assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_06_a_large_common_offset_does_not_swallow_the_loss(path):
    v = 5000
    hidden = leaf(torch.zeros(3, 4), grad=path != "score")
    logps = token_logps(
        hidden, torch.zeros(v, 4), torch.tensor([0, 4097, 4999]), impl=path,
        bias=torch.full((v,), 1e8),
    )  # fmt: skip
    torch.testing.assert_close(logps.detach(), torch.full((3,), -math.log(v)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "excluded",
    [
        pytest.param(slice(0, 4100), id="the-first-tile"),
        pytest.param(slice(1, None, 2), id="every-other"),
        pytest.param(slice(4200, None), id="the-last-tile"),
    ],
)
def test_07_excluded_tokens_are_harmless(path, excluded):
    v = 9000
    hidden, weight = torch.randn(5, 4), torch.randn(v, 4)
    bias = torch.randn(v)
    bias[excluded] = -torch.inf
    targets = torch.tensor([4150, 4152, 4154, 4156, 4158])
    keep = bias.isfinite()
    position = keep.cumsum(0)[targets] - 1
    if path == "score":
        logps = token_logps(hidden, weight, targets, bias=bias)
    else:
        logps, *grads = gradients(path, hidden, weight, targets, torch.ones(5), bias=bias)
        expected = truth(hidden, weight[keep], position, torch.ones(5), bias=bias[keep].double())
        torch.testing.assert_close(grads[0].double(), expected[1], rtol=1e-4, atol=1e-5)
        if path == "recompute":
            torch.testing.assert_close(grads[1][keep].double(), expected[2], rtol=1e-4, atol=1e-5)
            assert (grads[1][~keep] == 0).all()
    expected = reference.token_logps(hidden, weight[keep], position, bias=bias[keep])
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", TRAINED)
@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 80.0])
def test_08_the_gradient_of_a_confident_token_does_not_vanish(path, gap):
    hidden, weight = torch.tensor([[1.0, 0.5]]), torch.tensor([[gap, 1.0], [0.0, -1.0]])
    logps, grad, weight_grad = gradients(path, hidden, weight, torch.tensor([0]), torch.ones(1))
    other = math.exp(-gap - 1) / (1 + math.exp(-gap - 1))  # the other token's probability
    assert logps.item() == pytest.approx(-math.log1p(math.exp(-gap - 1)), rel=1e-5)
    torch.testing.assert_close(grad, other * (weight[:1] - weight[1:]), rtol=1e-5, atol=0)
    if path == "recompute":
        signs = torch.tensor([[1.0], [-1.0]])
        torch.testing.assert_close(weight_grad, other * signs * hidden, rtol=1e-5, atol=0)


class Linear:
    """Sends any gradient through a pair loss: the reference is the coefficients."""

    needs_ref, coupled, sparse, has_token_level = True, False, False, False

    def __call__(self, policy: PairLogps, ref: PairLogps, totals, token_losses):
        return (ref.chosen * policy.chosen + ref.rejected * policy.rejected) * totals.pairs


def all_gradients(path, hidden, weight, targets, coefficients, **options):
    """As ``gradients``, for the single pass too: one coefficient a token, in pairs of tokens."""
    if path != "single_pass":
        return gradients(path, hidden, weight, targets, coefficients, **options)
    hidden, weight, n = leaf(hidden), leaf(weight), len(targets)
    selection = TokenSelection(torch.arange(n), targets, torch.ones(n, dtype=torch.int64), (1,) * n)
    head = LmHead(weight, **options)
    out = pair_loss(hidden, head, selection, Linear(), ref_logps=coefficients)
    out.loss.backward()
    return out.token_logps, hidden.grad, weight.grad


@pytest.mark.parametrize("path", [*TRAINED, "single_pass"])
@pytest.mark.parametrize(
    ("v", "spread", "scale", "options"),
    [
        pytest.param(400, 0.5, 1e-8, {}, id="tiny-coefficients"),
        pytest.param(400, 0.5, 1e6, {}, id="large-coefficients"),
        pytest.param(400, 5e-4, 1.0, {"temperature": 1e-3}, id="steep"),
        pytest.param(400, 5e-4, 1.0, {"temperature": 1e-3, "softcap": 0.1}, id="steep-softcap"),
        pytest.param(400, 0.5, 1.0, {"logit_scale": 1e-4}, id="flat"),
        pytest.param(100_000, 1e-2, 1.0, {}, id="uniform-over-a-large-vocabulary"),
    ],
)
def test_09_fp16_gradients_neither_underflow_nor_overflow(
    half_factors, path, v, spread, scale, options
):
    n, d = 24, 16
    hidden = torch.randn(n, d) * spread
    hidden, weight = hidden.half().float(), torch.randn(v, d).half().float()
    data = hidden, weight, torch.randint(v, (n,)), scale * (1 + torch.rand(n))
    dtypes = half_factors(torch.float16)
    _, *grads = all_gradients(path, *data, **options)
    assert dtypes == {torch.float16}
    for got, want in zip(grads, truth(*data, **options)[1:], strict=True):
        if got is not None:
            assert relative(got, want) < 2e-3


def peaked(n=96, d=48, v=600):
    """Logits up to 30, with targets that are mostly the first choice."""
    weight = torch.randn(v, d).bfloat16().float()
    targets = torch.randint(v, (n,))
    hidden = (0.5 * weight[targets] + 0.7 * torch.randn(n, d)).bfloat16().float()
    return hidden, weight, targets, torch.randn(n)


@pytest.mark.parametrize("path", [*TRAINED, "single_pass"])
def test_10_recomputed_logits_are_those_of_the_statistics(half_factors, path):
    data = peaked()
    dtypes = half_factors(torch.bfloat16)
    logps, grad, _ = all_gradients(path, *data)
    assert dtypes == {torch.bfloat16}
    expected = truth(*data)
    torch.testing.assert_close(logps.double(), expected[0], rtol=1e-5, atol=2e-5)
    # Gradient tiles rounded to bf16 cost 1e-3; logits rounded to bf16 cost 2.4e-2.
    assert relative(grad, expected[1]) < 3e-3


@pytest.mark.parametrize("path", ["recompute", "single_pass"])
def test_11_gradients_of_many_chunks_are_rounded_once(path):
    n, d, v = 512, 16, 40
    hidden, weight, targets, _ = peaked(n, d, v)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    counts, ref = (2,) * 256, torch.randn(256)
    selection = TokenSelection(torch.arange(n), targets, torch.tensor(counts), counts)
    ours = leaf(hidden), leaf(weight)
    with tiles_of(4, v):
        out = pair_loss(
            ours[0], LmHead(ours[1]), selection, Linear(), ref_logps=ref, impl=path
        )  # fmt: skip
    out.loss.backward()
    expected = truth(hidden, weight, targets, ref.repeat_interleave(2))
    for got, want in zip((ours[0].grad, ours[1].grad), expected[1:], strict=True):
        once = relative(want.bfloat16(), want)
        assert relative(got, want) < 1.05 * once + 1e-6


@pytest.mark.parametrize("path", [*PATHS, "single_pass"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_12_every_product_has_half_precision_factors(half_factors, path, dtype):
    dtypes = half_factors(dtype)
    data = peaked(16, 8, 50)
    if path == "score":
        token_logps(*data[:3])
    else:
        all_gradients(path, *data)
    assert dtypes == {dtype}


@pytest.mark.parametrize("path", TRAINED)
def test_16_targets_at_any_offset_and_stride(path):
    hidden, weight = torch.randn(9, 8), torch.randn(50, 8)
    store = torch.randint(50, (20,))
    for view in (store[1:10], store[1:19:2], store[-9:]):
        got = gradients(path, hidden, weight, view, torch.ones(9))
        expected = gradients(path, hidden, weight, view.clone(), torch.ones(9))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


FIELDS = {
    "dpo-smoothed": ("dpo", {"label_smoothing": 0.2}),
    "dpo-length-penalty": ("dpo", {"length_alpha": 0.05}),
    "dpo-per-token": ("dpo", {"length_norm": True}),
    "ipo-per-token": ("ipo", {"length_norm": True}),
    "cpo-likelihood": ("cpo", {"nll_weight": 0.4}),
    "simpo-margin": ("simpo", {"gamma": 0.3, "label_smoothing": 0.1}),
    **{name: (name, {}) for name in LOSSES},
}


@pytest.mark.parametrize("case", FIELDS)
def test_17_the_fused_loss_is_the_loss(case):
    name, values = FIELDS[case]
    objective = Objective.parse(name, **values)
    hidden, weight, selection = pairs((5, 3, 2, 4, 6, 6), torch.float64)
    ref = -torch.rand(26).double() * 4
    with tiles_of(12, 67):
        out = pair_loss(hidden, LmHead(weight), selection, objective, ref_token_logps=ref)
    got = torch.autograd.grad(out.loss, [hidden, weight])

    logps = reference.token_logps(hidden, weight, selection.targets)
    lengths = selection.lengths
    sides = [
        PairLogps(sums[::2], sums[1::2], lengths[::2], lengths[1::2])
        for sums in (reference.sequence_logps(x, selection.counts) for x in (logps, ref))
    ]
    tokens = objective.token_losses(logps, ref, lengths) if objective.has_token_level else None
    losses = objective(*sides, token_losses=tokens)
    expected = torch.autograd.grad(losses.mean(), [hidden, weight])
    torch.testing.assert_close(out.losses, losses.detach(), rtol=1e-10, atol=1e-10)
    for ours, want in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["dpo", "ipo", "slic", "kto"])
def test_20_policy_and_reference_of_equal_weights_have_no_margin(name):
    hidden, weight, selection = pairs((300, 1, 17, 40), torch.bfloat16, v=4100)
    with torch.no_grad():
        ref = token_logps(hidden, weight, selection.targets, max_bytes=4 * 4100 * 19)
    out = pair_loss(
        hidden, LmHead(weight), selection, Objective.parse(name),
        ref_logps=sequence_logps(ref, selection.lengths),
    )  # fmt: skip
    zero = {"dpo": torch.log(torch.tensor(2.0)), "ipo": 25.0, "slic": 1.0, "kto": 0.5}[name]
    assert torch.equal(out.losses, torch.as_tensor(zero).expand(2))


def test_21_the_divisor_of_means_is_the_count_before_the_shift_if_given():
    hidden, weight, selection = pairs((5, 3))
    before = selection.lengths + 1
    objective = Objective.parse("ipo", beta=0.5, length_norm=True)
    ref = torch.zeros(2)
    for lengths, divisors in ((None, (5, 3)), (before, (6, 4))):
        out = pair_loss(
            hidden, LmHead(weight), selection, objective, ref_logps=ref, completion_lengths=lengths
        )
        margin = out.policy.chosen / divisors[0] - out.policy.rejected / divisors[1]
        torch.testing.assert_close(out.losses, (margin - 1.0).square())


def test_23_an_ignore_index_that_is_a_token_is_refused():
    with pytest.raises(ValueError, match="ignore_index: expected a negative number, got 42"):
        select_pairs(torch.zeros(2, 4, dtype=torch.int64), ignore_index=42)
