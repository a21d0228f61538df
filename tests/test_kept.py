"""The single pass that keeps half-precision gradients of logits until the backward pass.

A GPU's products are modelled by the fixture ``half_factors``. An explicit budget asks for chunks
of pairs in place of it, so each test can run both.
"""

from __future__ import annotations

import pytest
import torch
from kept_calls import (
    COUNTS,
    EVERYTHING,
    D,
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

from fastdaa import (
    LmHead,
    Objective,
    TokenSelection,
    kept_products,
    memory,
    pair_loss,
    row_passes,
    scaled_rows,
    target_rows,
    tiles,
)
from fastdaa.benchmarks.measure import measure_peak
from fastdaa.single_pass import plan_loss
from fastdaa.single_pass_memory import SinglePassRoom
from fastdaa.train.completion_loss import completion_loss

# What the interpreter's numpy says about masked -inf - -inf.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.interpreter,
]


def planned(leaves, engine="auto", coupled=False):
    return plan_loss(leaves[0], LmHead(*leaves[1:]), coupled=coupled, impl="auto", engine=engine)


@pytest.fixture
def in_chunks(monkeypatch):
    """``in_chunks()``: batches no longer fit; chunks keep 10 tokens or as told, tiles have 4."""

    def start(kept=10):
        monkeypatch.setattr(memory, "CPU_ROW_MULTIPLE", 2)
        monkeypatch.setattr(memory, "_CPU_BYTES", (4 * V * 4, 0))
        keep_at_most(monkeypatch, 2 * V * kept)
        monkeypatch.setattr(SinglePassRoom, "whole", lambda self: None)

    return start


@pytest.mark.parametrize(
    ("dtype", "engine", "options"),
    [
        pytest.param(torch.bfloat16, "torch", {}, id="bf16"),
        pytest.param(torch.bfloat16, "torch", EVERYTHING, id="bf16-everything"),
        pytest.param(torch.bfloat16, "triton", EVERYTHING, id="bf16-triton-everything"),
    ],
)
def test_losses_are_those_of_chunks_and_gradients_those_of_fp64(
    half_factors, in_chunks, dtype, engine, options
):
    leaves, selection = tensors(dtype, bias=bool(options))
    call = (leaves, selection, Objective.parse("dpo", beta=0.1))
    _, wide = truth(*call, options=options)
    half_factors(dtype)
    assert planned(leaves).kept_tokens == sum(COUNTS) and planned(leaves).kept_whole
    ours, grads = run(*call, options=options, engine=engine, stats=True)
    in_chunks()
    plan = planned(leaves)
    assert (plan.kept_tokens, plan.block_rows, plan.kept_whole) == (10, 4, False)
    chunked, others = run(*call, options=options, engine=engine, stats=True)
    for name in ("loss", "losses", "token_logps"):
        assert torch.equal(getattr(ours, name), getattr(chunked, name)), name
    assert all(torch.equal(a, b) for a, b in zip(ours.stats, chunked.stats, strict=True))
    # Three roundings; the interpreter truncates to bf16, which does not average out.
    limit = 2 * torch.finfo(dtype).eps
    for leaf, got, other, want in zip(
        (t for t in leaves if t is not None), grads, others, wide, strict=True
    ):
        assert got.dtype == leaf.dtype
        assert relative(got, want) < limit and relative(other, want) < limit


@pytest.mark.parametrize("objective", [{}, {"use_weighting": True}], ids=["plain", "weighted"])
def test_statistics_of_pairs_beyond_the_budget(half_factors, in_chunks, objective):
    """Their tiles are made twice, for the loss and for the gradient, and told once."""
    leaves, selection = tensors(torch.bfloat16)
    half_factors(torch.bfloat16)
    call = (leaves, selection, Objective.parse("dpo", **objective))
    whole, grads = run(*call, stats=True)
    in_chunks(kept=6)
    assert (
        planned(leaves).kept_tokens
        == 6
        < max(map(sum, zip(COUNTS[::2], COUNTS[1::2], strict=True)))
    )
    parts, others = run(*call, stats=True)
    assert torch.equal(parts.losses, whole.losses)
    assert all(torch.equal(a, b) for a, b in zip(parts.stats, whole.stats, strict=True))
    for a, b in zip(grads, others, strict=True):
        assert relative(a, b.double()) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("peak", [1.0, 10.0, 40.0])
def test_gradients_are_as_good_as_those_of_materialised_logits(half_factors, peak):
    """``(hidden @ weight.T).float()`` and autograd."""
    dtype = torch.bfloat16
    counts, v, d = (24,) * 16, 3000, 96
    n, coefficients = sum(counts), torch.randn(16)
    weight = (torch.randn(v, d) * d**-0.5).to(dtype)
    targets = torch.randint(v, (n,))
    hidden = (weight[targets].float() * peak * 0.8 + torch.randn(n, d) * peak / 8).to(dtype)
    selection = TokenSelection(torch.arange(n), targets, torch.tensor(counts), counts)
    call = ([hidden, weight, None], selection, Linear())
    _, wide = truth(*call, ref_logps=coefficients)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    logits = (leaves[0] @ leaves[1].T).float()
    logps = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    (logps * coefficients.repeat_interleave(24)).sum().backward()
    half_factors(dtype)
    _, grads = run(*call, ref_logps=coefficients)
    for got, leaf, want in zip(grads, leaves, wide, strict=True):
        assert relative(got, want) <= relative(leaf.grad, want)


@pytest.mark.parametrize("mean", [0, 1, 3])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunks"])
def test_targets_that_cancel_the_others(half_factors, monkeypatch, chunked, mean):
    problem = OneSign(mean)
    half_factors(torch.bfloat16)
    counts = 128 * (16,)
    selection = TokenSelection(
        torch.arange(2048), problem.targets, torch.tensor(counts), counts
    )  # fmt: skip
    leaves = [problem.hidden, problem.weight, None]
    if chunked:
        keep_at_most(monkeypatch, 2 * 512 * 320)
        monkeypatch.setattr(SinglePassRoom, "whole", lambda self: None)
    plan = planned(leaves)
    assert (plan.kept_tokens, plan.kept_whole) == ((320, False) if chunked else (2048, True))
    _, grads = run(leaves, selection, Linear(), ref_logps=torch.ones(128))
    problem.check(grads)


def test_a_large_weight_gradient_is_one_product(half_factors, monkeypatch):
    half_factors(torch.bfloat16)
    leaves, selection = tensors(torch.bfloat16, bias=True)
    call = (leaves, selection, Objective.parse("dpo", beta=0.1))
    _, sliced = run(*call)
    monkeypatch.setattr(tiles, "UNSPLIT_ENTRIES", 0)
    sums = []
    inner = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *a: sums.append(a[0].shape) or inner(*a))
    _, whole = run(*call)
    assert sums == [(V, D)]
    _, wide = truth(*call)
    assert relative(whole[1], wide[1]) < 1.02 * relative(sliced[1], wide[1])


def test_backward_runs_twice_with_the_same_bits(half_factors):
    dtype = torch.bfloat16
    half_factors(dtype)
    leaves, selection = tensors(dtype, bias=True)
    out = pair_loss(leaves[0], LmHead(*leaves[1:]), selection, Objective.parse("simpo"))
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    again = torch.autograd.grad(out.loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(g.any() for g in first)


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunks"])
def test_rows_without_a_coefficient_leave_the_products(half_factors, in_chunks, engine, chunked):
    dtype = torch.bfloat16
    half_factors(dtype)
    leaves, selection = tensors(dtype, bias=True)
    if chunked:
        in_chunks()
    ref = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0])
    _, grads = run(leaves, selection, Linear(), ref_logps=ref, engine=engine)
    _, wide = truth(leaves, selection, Linear(), ref_logps=ref)
    for got, want in zip(grads, wide, strict=True):
        assert relative(got, want) < 2 * torch.finfo(dtype).eps
    active = ref.repeat_interleave(selection.lengths) != 0
    assert (grads[0][~active] == 0).all() and grads[0][active].any(1).all()
    _, grads = run(leaves, selection, Linear(), ref_logps=torch.zeros(8), engine=engine)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunks"])
def test_slices_of_the_rows_that_remain_give_the_same(
    half_factors, in_chunks, monkeypatch, chunked
):
    half_factors(torch.bfloat16)
    if chunked:
        in_chunks()
    leaves, selection = tensors(torch.bfloat16, bias=True)
    ref = torch.tensor([0.0, 0.5, 1.0, 0.0, -1.0, 2.0, 0.0, 0.0])
    _, expected = run(leaves, selection, Linear(), ref_logps=ref)
    for module in (tiles, row_passes):
        monkeypatch.setattr(module, "PRODUCT_BYTES", 2 * V * 2)  # two rows of logits
    monkeypatch.setattr(tiles, "_SLICE_ROWS", 3)
    _, grads = run(leaves, selection, Linear(), ref_logps=ref)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["logits", "kept"])
def test_sums_that_no_product_begins_are_0(half_factors, in_chunks, monkeypatch, dtype):
    leaves, selection = tensors(dtype, bias=True)
    half_factors(dtype)
    in_chunks()
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: real(*a, **k).fill_(float("nan")))
    _, grads = run(leaves, selection, Linear(), ref_logps=torch.zeros(8), impl="single_pass")
    assert all((g == 0).all() for g in grads)


def test_rows_move_to_the_front_in_place(monkeypatch):
    tile, rows = torch.randn(9, 5), torch.tensor([0, 2, 3, 7, 8])
    want = tile[rows]
    monkeypatch.setattr(row_passes, "PRODUCT_BYTES", 2 * 5 * 4)  # two rows
    moved = row_passes.move_to_front(tile, rows)
    assert torch.equal(moved, want) and moved.data_ptr() == tile.data_ptr()


@pytest.mark.parametrize("counts", [(4, 0, 0, 3), (0, 0, 0, 0)], ids=str)
def test_empty_completions_and_empty_batches_are_finite(half_factors, counts):
    half_factors(torch.bfloat16)
    leaves, selection = tensors(torch.bfloat16, counts)
    out, grads = run(leaves, selection, Objective.parse("dpo"))
    assert out.losses.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert bool(grads[1].any()) == bool(sum(counts))


def test_tiles_and_slices_of_any_size_give_the_same(half_factors, monkeypatch):
    half_factors(torch.bfloat16)
    leaves, selection = tensors(torch.bfloat16, bias=True)
    call = (leaves, selection, Objective.parse("dpo"))
    whole, expected = run(*call)
    monkeypatch.setattr(memory, "CPU_ROW_MULTIPLE", 5)
    monkeypatch.setattr(memory, "_CPU_BYTES", (4 * V * 5, 4 * V * 5))  # a pair has up to 10 tokens
    monkeypatch.setattr(tiles, "_SLICE_ROWS", 8)
    monkeypatch.setattr(tiles, "PRODUCT_BYTES", 4 * D * 8)
    assert planned(leaves).tile_rows == 5
    out, grads = run(*call)
    assert torch.equal(out.token_logps, whole.token_logps)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_only_the_wanted_gradients_are_made(half_factors, wanted):
    half_factors(torch.bfloat16)
    check_wanted_alone(*tensors(torch.bfloat16, bias=True), wanted)


def test_gradients_have_the_dtypes_of_their_tensors(half_factors):
    """As under autocast: fp32 tensors, products in half precision."""
    leaves, selection = tensors(torch.float32, bias=True)
    call = (leaves, selection, Objective.parse("dpo"))
    _, wide = truth(*call)
    assert half_factors(torch.bfloat16) == set()
    _, grads = run(*call)
    for got, want in zip(grads, wide, strict=True):
        assert got.dtype == torch.float32 and relative(got, want) < 6e-3


@pytest.mark.parametrize("name", ["kto", "aot"])
def test_losses_that_couple_the_batch_cost_3u_where_it_fits(half_factors, in_chunks, name):
    half_factors(torch.bfloat16)
    leaves, selection = tensors(torch.bfloat16)
    assert planned(leaves, coupled=True).path == "single_pass"
    call = (leaves, selection, Objective.parse(name))
    ours, grads = run(*call)
    other, expected = run(*call, impl="recompute")
    assert torch.equal(ours.losses, other.losses)
    for got, want in zip(grads, expected, strict=True):
        assert relative(got, want.double()) < 8e-3
    in_chunks()
    assert planned(leaves, coupled=True).keeps_part


def test_the_loss_of_completions_takes_this_way(half_factors, in_chunks):
    half_factors(torch.bfloat16)
    leaves, selection = tensors(torch.bfloat16)
    results = []
    for change in (lambda: None, in_chunks):
        change()
        out = completion_loss(leaves[0], LmHead(leaves[1]), selection.targets, stats=True)
        results.append((out.logps, *torch.autograd.grad(out.total, leaves[:2])))
    assert torch.equal(results[0][0], results[1][0])
    for got, want in zip(results[0][1:], results[1][1:], strict=True):
        assert relative(got, want.double()) < 8e-3


def test_memory_is_the_kept_gradients_and_a_tile(half_factors, monkeypatch):
    """Chunks of pairs hold an fp32 sum of the weight's gradient as well: 2 MiB here."""
    half_factors(torch.bfloat16)
    # Without the model's own copies of the factors in fp32.
    for module in (tiles, kept_products):
        monkeypatch.setattr(module, "product", lambda a, b, out=None: torch.mm(a, b).float())
    counts, v, d, tile_rows = (64,) * 8, 2048, 256, 32
    monkeypatch.setattr(memory, "_CPU_BYTES", (4 * v * tile_rows, 0))
    monkeypatch.setattr(tiles, "PRODUCT_BYTES", 4 * d * 128)
    for module in (target_rows, scaled_rows):
        monkeypatch.setattr(module, "_PART_BYTES", 4 * d * 16)
    leaves, selection = tensors(torch.bfloat16, counts, v, d)
    plan = planned(leaves)
    assert (plan.kept_bytes, plan.tile_rows) == (2 * 512 * v, tile_rows)
    outputs, grads = [], []

    def forward():
        out = pair_loss(
            leaves[0], LmHead(leaves[1]), selection, Objective.parse("dpo"),
            ref_logps=torch.zeros(8),
        )  # fmt: skip
        outputs.append(out.loss)

    def step():
        forward()
        grads.extend(torch.autograd.grad(outputs.pop(), leaves[:2]))

    forward()
    small, rows = 144 << 10, 2 * leaves[0].numel()
    # The model rounds a product before it widens it: half a tile more.
    assert measure_peak(forward, "cpu")[1] - plan.kept_bytes < rows + 1.5 * plan.tile_bytes + small
    outputs.clear()
    extra = measure_peak(step, "cpu")[1] - sum(2 * g.numel() for g in grads)
    assert extra - plan.kept_bytes < 2 * rows + 1.5 * tiles.PRODUCT_BYTES + small
