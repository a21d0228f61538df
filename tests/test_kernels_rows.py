"""The Triton row kernels against fp64, and every path of the head that uses them.

Without a GPU the kernels run in Triton's interpreter (conftest.py). It truncates where a GPU
rounds to bf16, so that dtype is held to a unit in the last place instead of half of one.
"""

from __future__ import annotations

import importlib.util
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from tile_budget import tiles_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastdaa import (
    LmHead,
    Objective,
    PairLogps,
    TokenSelection,
    TokenStats,
    VocabShard,
    memory,
    pair_loss,
    plan_head,
    reference,
    sequence_logps,
    token_entropy,
    token_logps,
    token_stats,
)
from fastdaa.engines import TritonTile
from fastdaa.logps import head_logps

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastdaa.kernels import configs  # noqa: E402
from fastdaa.kernels.column_sums import sum_columns  # noqa: E402
from fastdaa.kernels.configs import RowConfig  # noqa: E402
from fastdaa.kernels.elementary import exact_sum, expm1, log1p, tanh_and_slope  # noqa: E402
from fastdaa.kernels.merge_splits import merge_splits  # noqa: E402
from fastdaa.kernels.row_gradient import write_row_gradient  # noqa: E402
from fastdaa.kernels.row_slopes import take_row_slopes  # noqa: E402
from fastdaa.kernels.row_statistics import (  # noqa: E402
    take_row_states,
    take_row_statistics,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = RowConfig(16, 4, split_v=64)
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "negative-scale": {"logit_scale": -1.5},
    "temperature": {"temperature": 1.7},
    "everything": {"bias": True, "softcap": 3.0, "logit_scale": 1.6, "temperature": 0.8},
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Largest relative size of one rounding; the interpreter truncates to bf16.
UNIT = {"fp32": 2.0**-20, "fp16": 2.0**-11, "bf16": 2.0**-7}


@pytest.fixture
def poisoned():
    """Memory that a kernel has to fill holds NaN before."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 columns and slices of 40, so that small vocabularies take many."""
    for name in ("_CPU_COLUMNS", "_DEVICE_COLUMNS"):
        monkeypatch.setattr(memory, name, 40)
    small = {
        name: dict.fromkeys(table, RowConfig(16, 4, block_n=4))
        for name, table in configs.ROW_CONFIGS.items()
    }
    monkeypatch.setattr(configs, "ROW_CONFIGS", small)


def final(z: Tensor, bias=None, logit_scale=1.0, softcap=None, temperature=1.0) -> Tensor:
    """Final logits in fp64."""
    z = z.double() if bias is None else z.double() + bias.double()
    z = z * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / temperature


def rows_of(r, v, head="plain", spread=4.0):
    """Raw products, targets (the last column among them) and head options."""
    options = dict(HEADS[head])
    if options.pop("bias", False):
        options["bias"] = torch.randn(v, device=DEVICE)
    z, targets = torch.randn(r, v, device=DEVICE) * spread, torch.randint(v, (r,), device=DEVICE)
    targets[0] = v - 1
    return z, targets, options


def picked(z: Tensor, targets: Tensor) -> Tensor:
    return z.gather(1, targets[:, None])[:, 0]


# Elementary functions


@triton.jit
def _evaluate_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    u, slope = tanh_and_slope(x)
    tl.store(out_ptr + i, log1p(tl.abs(x)), mask=i < N)
    tl.store(out_ptr + N + i, expm1(-tl.abs(x)), mask=i < N)
    tl.store(out_ptr + 2 * N + i, u, mask=i < N)
    tl.store(out_ptr + 3 * N + i, slope, mask=i < N)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_elementary_functions_are_accurate_to_a_few_roundings(sign):
    x = torch.cat([torch.logspace(-30, 1.6, 4000), torch.linspace(0.01, 40, 4000)]).to(DEVICE)
    x = sign * x
    out = torch.full((4, len(x)), torch.nan, device=DEVICE)
    blocks = triton.cdiv(len(x), 512)
    _evaluate_kernel[(blocks,)](x, out, len(x), BLOCK=512, enable_fp_fusion=True)
    size, wide = x.double().abs(), x.double()
    truth = (size.log1p(), torch.expm1(-size), wide.tanh(), 1 / wide.cosh().square())
    for name, got, want in zip(("log1p", "expm1", "tanh", "slope"), out, truth, strict=True):
        # The slope's exponential carries the rounding of its argument, up to 80, to base 2.
        allowed = 4e-7 if name != "slope" else 4e-7 + 1.5e-7 * size
        error = (got.double() - want).abs() / want.abs()
        error = error[want.abs() > 1e-35]
        limit = allowed if isinstance(allowed, float) else allowed[want.abs() > 1e-35]
        assert (error <= limit).all(), (name, error.max())


# Statistics


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("r", "v", "config"),
    [
        pytest.param(1, 1, SMALL, id="one-column"),
        pytest.param(3, 2, SMALL, id="two-columns"),
        pytest.param(5, 16, SMALL, id="one-block"),
        pytest.param(5, 17, SMALL, id="one-more"),
        pytest.param(4, 203, SMALL, id="many-blocks"),
        pytest.param(4, 203, None, id="the-table's-block"),
    ],
)
def test_statistics_against_fp64(poisoned, r, v, config, head):
    z, targets, options = rows_of(r, v, head)
    before = z.clone()
    got = take_row_statistics(z, targets, stats=True, config=config, **options)
    assert torch.equal(z, before)
    f = final(z, **options)
    logp = torch.log_softmax(f, dim=1)
    top = f.amax(dim=1)
    truth = (
        top, (f - top[:, None]).exp().sum(1).log(), picked(logp, targets), picked(f, targets),
        -(logp.exp() * logp).sum(1), (picked(f, targets) >= top).double(), f.mean(1),
        logp.exp().square().sum(1).log(),
    )  # fmt: skip
    for name, value, want in zip(got._fields, got, truth, strict=True):
        torch.testing.assert_close(value.double(), want, rtol=3e-6, atol=3e-6, msg=name)


def test_statistics_of_real_vocabulary_sizes(poisoned):
    for v in (50257, 151_936 // 8 + 1):
        z, targets, _ = rows_of(2, v, spread=6.0)
        got = take_row_statistics(z, targets, stats=True)
        logp = torch.log_softmax(z.double(), dim=1)
        assert (got.logps.double() - picked(logp, targets)).abs().max() < 4e-6
        assert (got.entropy.double() + (logp.exp() * logp).sum(1)).abs().max() < 4e-6


def test_without_metrics_the_same_bits(poisoned):
    z, targets, options = rows_of(5, 203, "everything")
    full = take_row_statistics(z, targets, stats=True, config=SMALL, **options)
    plain = take_row_statistics(z, targets, config=SMALL, **options)
    assert plain[4:] == (None,) * 4
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], full[:4], strict=True))


def test_columns_beyond_the_vocabulary_and_rows_of_any_stride():
    store = torch.full((4, 300), torch.nan, device=DEVICE)
    z, targets, options = rows_of(4, 203, "bias")
    store[:, 50:253] = z
    strided = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    strided[1::2] = targets
    got = take_row_statistics(store[:, 50:253], strided[1::2], config=SMALL, **options)
    want = take_row_statistics(z, targets, config=SMALL, **options)
    assert all(torch.equal(a, b) for a, b in zip(got[:4], want[:4], strict=True))


def test_a_row_has_the_same_bits_in_any_company():
    z, targets, options = rows_of(6, 203, "everything")
    whole = take_row_statistics(z, targets, stats=True, **options)
    for _ in range(2):
        one = take_row_statistics(z[4:5], targets[4:5], stats=True, **options)
        assert all(torch.equal(a, b[4:5]) for a, b in zip(one, whole, strict=True))


@pytest.mark.parametrize("head", ["plain", "everything"])
@pytest.mark.parametrize("width", [64, 128, 192])
def test_a_row_has_the_same_bits_in_tiles_of_its_splits(poisoned, width, head):
    z, targets, options = rows_of(6, 203, head)
    bias = options.pop("bias", None)
    whole = take_row_statistics(z, targets, stats=True, config=SMALL, bias=bias, **options)
    states = []
    for start in range(0, 203, width):
        columns = slice(start, min(start + width, 203))
        part = {"bias": None if bias is None else bias[columns], **options}
        tile = z[:, columns].contiguous()
        more = {"first_column": start, "stats": True, "config": SMALL}
        states.append(take_row_states(tile, targets, **more, **part))
    got = merge_splits(torch.cat(states), targets, 203)
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 80.0])
@pytest.mark.parametrize("column", [0, 16, 36], ids=["first", "middle", "last"])
def test_the_log_prob_of_a_confident_target_does_not_vanish(gap, column):
    z = torch.zeros(1, 37, device=DEVICE)
    z[0, column] = gap
    got = take_row_statistics(z, torch.tensor([column], device=DEVICE), stats=True, config=SMALL)
    rest = 36 * math.exp(-gap)
    assert got.logps.item() == pytest.approx(-math.log1p(rest), rel=1e-5)
    assert got.log_s.item() == pytest.approx(math.log1p(rest), rel=1e-5)
    assert got.top1.item() == 1.0
    p = math.exp(-gap) / (1 + rest)
    assert got.entropy.item() == pytest.approx(math.log1p(rest) + 36 * p * gap, rel=1e-4)


def test_a_tie_with_the_maximum():
    z = torch.zeros(2, 40, device=DEVICE)
    z[:, 3] = z[:, 30] = 50.0
    got = take_row_statistics(z, torch.tensor([30, 5], device=DEVICE), stats=True, config=SMALL)
    assert got.top1.tolist() == [1.0, 0.0]
    want = torch.log_softmax(z.double(), 1)[[0, 1], [30, 5]]
    torch.testing.assert_close(got.logps.double(), want)


@pytest.mark.parametrize(
    "excluded",
    [
        pytest.param(slice(0, 48), id="the-first-blocks"),
        pytest.param(slice(1, None, 2), id="every-other"),
        pytest.param(slice(64, None), id="the-last-blocks"),
    ],
)
def test_excluded_tokens_are_harmless(poisoned, excluded):
    z, targets, _ = rows_of(4, 203)
    z[:, excluded] = -torch.inf
    keep = z[0].isfinite()
    targets[:] = keep.nonzero()[[3, 0, -1, 7], 0]
    got = take_row_statistics(z, targets, stats=True, config=SMALL)
    logp = torch.log_softmax(z[:, keep].double(), dim=1)
    position = keep.cumsum(0)[targets] - 1
    torch.testing.assert_close(got.logps.double(), picked(logp, position), rtol=1e-5, atol=1e-6)
    entropy = -(logp.exp() * logp).sum(1)
    torch.testing.assert_close(got.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    excluded_target = (~keep).nonzero()[:4, 0]
    assert (take_row_statistics(z, excluded_target, config=SMALL).logps == -torch.inf).all()


def test_sums_hold_flat_rows_and_thousands_of_small_terms():
    """The ends of the range of sums in fixed point: all terms 1, and terms of 10^-9 beside a 1."""
    v = 24576
    z = torch.zeros(2, v, device=DEVICE)
    z[1], z[1, 100] = -21.0, 0.0
    got = take_row_statistics(z, torch.tensor([5, 20000], device=DEVICE), stats=True)
    want = [math.log(v), math.log1p((v - 1) * math.exp(-21))]
    assert got.log_s.tolist() == pytest.approx(want, rel=1e-6, abs=2e-7)
    p = math.exp(-21 - want[1])
    assert got.entropy.tolist() == pytest.approx([want[0], want[1] + 21 * v * p], rel=1e-3)


def test_a_large_common_offset_does_not_swallow_the_log_prob():
    v = 5000
    z = torch.full((1, v), 1e8, device=DEVICE)
    got = take_row_statistics(z, torch.tensor([4097], device=DEVICE), stats=True)
    assert got.logps.item() == pytest.approx(-math.log(v), rel=1e-6)
    assert got.entropy.item() == pytest.approx(math.log(v), rel=1e-6)


@pytest.mark.filterwarnings("ignore:(invalid|divide):RuntimeWarning")
def test_broken_rows_say_so_and_leave_the_others_alone():
    z, targets, _ = rows_of(6, 40)
    z[0] = -torch.inf
    z[1, 7] = torch.nan
    z[2, 7] = torch.inf
    targets[3], targets[4] = -1, 40
    got = take_row_statistics(z, targets, config=SMALL)
    assert got.m[0] == 0.0
    assert got.logps[:5].isnan().all() and got.logps[5].isfinite()


@pytest.mark.filterwarnings("ignore:(invalid|divide):RuntimeWarning")
@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_a_target_without_a_finite_logit_has_no_log_prob(logit):
    z, targets, _ = rows_of(2, 203)
    z[0, targets[0]] = logit
    for got in (
        take_row_statistics(z, targets, config=SMALL),
        take_row_slopes(z, targets, torch.empty_like(z), config=SMALL)[0],
    ):
        assert got.logps[0].isnan() and got.logps[1].isfinite()


def test_splits_that_a_narrow_slice_of_the_vocabulary_lacks_hold_nothing(monkeypatch):
    """A slice of two splits in a group whose widest slice has three; all logits are negative."""
    small = {"row_statistics": dict.fromkeys(configs.ARCHITECTURES, SMALL)}
    monkeypatch.setattr(configs, "ROW_CONFIGS", configs.ROW_CONFIGS | small)
    v = 2 * SMALL.split_v - 5
    z = torch.randn(2, v, device=DEVICE) - 20.0
    targets = torch.stack([z[0].argmax(), z[1].argmin()])
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr(dist, "all_gather", lambda out, own, group=None: out[0].copy_(own))
    weight = torch.empty(v, 1, device=DEVICE)
    found = [
        TritonTile(LmHead(weight, shard=shard), z, slice(0, v), torch.bfloat16).statistics(
            targets, stats=True
        )
        for shard in (None, VocabShard(0, v, widest=3 * SMALL.split_v))
    ]
    for got, want in zip(found[1], found[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# The gradient


def gradient_truth(z, targets, coefficients, h=None, **options) -> Tensor:
    """Of ``sum(g logp + h H)`` by the raw products, in fp64."""
    leaf = z.double().requires_grad_()
    logp = torch.log_softmax(final(leaf, **options), dim=1)
    loss = (coefficients.double() * picked(logp, targets)).sum()
    if h is not None:
        loss = loss - (h.double() * (logp.exp() * logp).sum(1)).sum()
    return torch.autograd.grad(loss, leaf)[0]


def gradient_of(z, targets, state, coefficients, dtype="fp32", config=SMALL, **options) -> Tensor:
    return write_row_gradient(
        z, targets, *state[:3], coefficients, dtype=DTYPES[dtype], config=config, **options
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True], ids=["log-prob", "entropy"])
def test_gradient_against_fp64(poisoned, dtype, head, entropy):
    z, targets, options = rows_of(5, 83, head)
    g, extra = torch.randn(5, device=DEVICE), {}
    state = take_row_statistics(z, targets, stats=True, config=SMALL, **options)
    h = torch.randn(5, device=DEVICE) if entropy else None
    if entropy:
        extra = {"entropy": state.entropy, "entropy_coefficients": h}
    want = gradient_truth(z, targets, g, h, **options)
    out = torch.empty(5, 83, dtype=DTYPES[dtype], device=DEVICE)
    got = gradient_of(z, targets, state, g, dtype, out=out, **extra, **options)
    assert got is out
    # Small entries: the roundings of exponents, and the coarse end of fp16.
    limit = UNIT[dtype] * want.abs() + 2e-6 * want.abs().amax(1, keepdim=True)
    limit += 6e-8 if dtype == "fp16" else 0.0
    assert ((got.double() - want).abs() <= limit).all()
    in_place = gradient_of(z, targets, state, g, dtype, **extra, **options)
    assert in_place.data_ptr() == z.data_ptr()
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 32, 64, 256])
@pytest.mark.parametrize("v", [1, 15, 16, 33, 211])
def test_in_place_no_write_overtakes_a_read(dtype, block, v):
    """Also with rows that lie apart: what is between them stays."""
    store = torch.randn(4, 300, device=DEVICE) * 3
    z, targets = store[:, 40 : 40 + v], torch.full((4,), v - 1, device=DEVICE)
    g, before = torch.randn(4, device=DEVICE), store.clone()
    state = take_row_statistics(z, targets)
    out = torch.full((4, v), torch.nan, dtype=DTYPES[dtype], device=DEVICE)
    config = RowConfig(block, 4)
    gradient_of(z, targets, state, g, dtype, config, out=out)
    assert torch.equal(store, before)
    got = gradient_of(z, targets, state, g, dtype, config)
    assert got.stride(0) == z.stride(0) * 4 // got.element_size()
    assert torch.equal(got, out)
    assert torch.equal(store[:, :40], before[:, :40])
    assert torch.equal(store[:, 40 + v :], before[:, 40 + v :])


def test_what_is_written_counts_as_changed():
    """Autograd and checkpoints go by the version of a tensor, which a kernel does not move."""
    z, targets = torch.randn(3, 20, device=DEVICE), torch.arange(3, device=DEVICE)
    beside = torch.empty(3, 20, dtype=torch.bfloat16, device=DEVICE)
    found = take_row_slopes(z, targets, beside)[0]
    assert beside._version > 0 and z._version == 0
    for out in (beside, None):
        before = [t._version for t in (z, beside)]
        write_row_gradient(z, targets, *found[:3], found.m, dtype=torch.bfloat16, out=out)
        assert [t._version > b for t, b in zip((z, beside), before, strict=True)] == [
            out is None, out is not None,
        ]  # fmt: skip


def test_a_checkpoint_that_kept_products_sees_that_they_are_gone():
    """A gradient lies where they were; it would be taken for the logits."""
    hidden = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(32, 8, device=DEVICE)
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    value = checkpoint(
        lambda h: token_entropy(h, weight, engine="triton").sum(), hidden, use_reentrant=False,
        context_fn=contexts,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="mutated"):
        value.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_coefficient_are_zero_and_not_read(dtype):
    z, targets, _ = rows_of(4, 83)
    state = take_row_statistics(z, targets, config=SMALL)
    z[1] = torch.nan
    g = torch.tensor([1.0, 0.0, -2.0, 0.0], device=DEVICE)
    got = gradient_of(z, targets, state, g, dtype)
    assert (got[1::2] == 0).all() and (got[::2] != 0).any(dim=1).all()


def test_an_entropy_coefficient_alone_keeps_a_row():
    z, targets, _ = rows_of(2, 83)
    state = take_row_statistics(z, targets, stats=True, config=SMALL)
    g, h = torch.zeros(2, device=DEVICE), torch.tensor([0.0, 1.5], device=DEVICE)
    want = gradient_truth(z, targets, g, h)
    got = gradient_of(z, targets, state, g, entropy=state.entropy, entropy_coefficients=h)
    assert (got[0] == 0).all()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid:RuntimeWarning")
def test_the_entropy_gradient_of_excluded_and_certain_tokens_is_finite():
    z = torch.randn(2, 40, device=DEVICE)
    z[0, ::2] = -torch.inf
    z[1, 5] = 500.0
    targets = torch.tensor([1, 5], device=DEVICE)
    state = take_row_statistics(z, targets, stats=True, config=SMALL)
    one = torch.ones(2, device=DEVICE)
    got = gradient_of(z, targets, state, one, entropy=state.entropy, entropy_coefficients=one)
    assert got.isfinite().all() and (got[0, ::2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_picked_rows(poisoned, dtype):
    z, targets, options = rows_of(6, 83, "everything")
    g = torch.randn(6, device=DEVICE)
    state = take_row_statistics(z, targets, config=SMALL, **options)
    rows = torch.tensor([4, 0, 5], device=DEVICE)
    out = torch.empty(3, 83, dtype=DTYPES[dtype], device=DEVICE)
    gradient_of(z, targets, state, g, dtype, rows=rows, out=out, **options)
    assert torch.equal(out, gradient_of(z, targets, state, g, dtype, **options)[rows])


def test_slices_of_the_vocabulary_make_up_the_whole():
    z, targets, options = rows_of(5, 83, "everything")
    g = torch.randn(5, device=DEVICE)
    state = take_row_statistics(z, targets, config=SMALL, **options)
    parts = []
    for start, stop in ((0, 30), (30, 31), (31, 83)):
        part = {**options, "bias": options["bias"][start:stop]}
        tile = z[:, start:stop].clone()
        parts.append(gradient_of(tile, targets, state, g, first_column=start, **part))
    assert torch.equal(torch.cat(parts, 1), gradient_of(z, targets, state, g, **options))


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 80.0])
def test_the_gradient_of_a_confident_target_does_not_vanish(gap):
    z = torch.tensor([[gap, 0.0]], device=DEVICE)
    targets = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    state = take_row_statistics(z, targets)
    got = gradient_of(z, targets, state, torch.ones(1, device=DEVICE))
    other = math.exp(-gap) / (1 + math.exp(-gap))
    assert got[0].tolist() == pytest.approx([other, -other], rel=1e-5)


def test_no_rows():
    z, targets = torch.zeros(0, 9, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    got = take_row_statistics(z, targets, stats=True)
    assert [t.shape for t in got] == [(0,)] * 8
    assert gradient_of(z, targets, got, got.m, "bf16").shape == (0, 9)


STORE = torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"z": torch.zeros(2, 3).half()}, "z: expected fp32", id="half"),
        pytest.param({"z": torch.zeros(3, 2).T}, "z: expected fp32 with contiguous", id="columns"),
        pytest.param({"z": torch.zeros(1, 3).expand(2, 3)}, "rows apart", id="overlap"),
        pytest.param({"rows": torch.zeros(1).long()}, "rows: expected an out", id="rows"),
        pytest.param({"entropy": torch.zeros(2)}, "entropy: expected both", id="entropy"),
        pytest.param({"out": torch.zeros(2, 4)}, "out: expected torch.float32 with 3", id="out"),
        pytest.param(
            {"z": STORE[:, :3], "out": STORE[:, 3:]}, "out: expected memory of its own", id="shared"
        ),
    ],
)
def test_gradient_arguments_that_do_not_fit(change, message):
    vector = torch.zeros(2)
    call = {
        "z": torch.zeros(2, 3), "targets": vector.long(), "m": vector, "log_s": vector,
        "logps": vector, "coefficients": vector, "dtype": torch.float32, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        write_row_gradient(**call)


# Column sums


@pytest.mark.parametrize("n", [0, 1, 7, 512, 513, 1300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_column_sums_against_fp64(poisoned, n, dtype):
    x = torch.randn(n, 2 * 70, device=DEVICE).to(DTYPES[dtype])[:, :70]
    got = sum_columns(x)
    assert got.dtype == torch.float32 and torch.equal(got, sum_columns(x))
    limit = 1e-6 * max(n, 1) ** 0.5 * (1 + x.double().abs().sum(0)).sqrt()
    assert ((got.double() - x.double().sum(0)).abs() <= limit).all()


# The engine


def problem(n=9, d=24, v=83, dtype="fp32", head="plain", bias_grad=True):
    options = dict(HEADS[head])
    bias = torch.randn(v, device=DEVICE) if options.pop("bias", False) else None
    hidden = torch.randn(n, d, device=DEVICE)
    weight = torch.randn(v, d, device=DEVICE) * 3 / d**0.5
    leaves = [None if t is None else t.to(DTYPES[dtype]) for t in (hidden, weight, bias)]
    return leaves, torch.randint(v, (n,), device=DEVICE), options


def run(fn, leaves, targets, coefficients, options, path, dtype=None, **kwargs):
    """Log-probs and the gradients of everything that a path differentiates."""
    wanted = {"score": 0, "frozen": 1}.get(path, 3)
    copies = [
        None if t is None else t.to(dtype or t.dtype, copy=True).requires_grad_(i < wanted)
        for i, t in enumerate(leaves)
    ]
    logps = fn(copies[0], copies[1], targets, bias=copies[2], **options, **kwargs)
    if wanted:
        (logps * coefficients.to(logps.dtype)).sum().backward()
    return [logps.detach(), *(t.grad for t in copies if t is not None and t.grad is not None)]


@pytest.mark.parametrize(
    ("dtype", "head"),
    [(d, h) for d in DTYPES for h in HEADS if d == "fp32" or h in ("plain", "everything")],
)
@pytest.mark.parametrize("path", ["score", "frozen", "recompute"])
def test_token_logps_in_triton(within_budget, small_blocks, path, dtype, head):
    leaves, targets, options = problem(dtype=dtype, head=head)
    g = torch.randn(9, device=DEVICE)
    call = (leaves, targets, g, options, path)
    truth = run(reference.token_logps, *call, dtype=torch.float64)
    eager = run(reference.token_logps, *call)
    with tiles_of(4, 83):
        ours = run(token_logps, *call, impl=path, engine="triton")
    for i, (got, want, exact) in enumerate(zip(ours, eager, truth, strict=True)):
        within_budget(f"output {i}", got, want, exact, 120)


def test_every_path_and_budget_gives_the_same_bits(small_blocks):
    leaves, targets, options = problem(head="everything")
    g, seen = torch.ones(9, device=DEVICE), []
    # A GPU's products of few rows may round in their own way: there, one budget.
    budgets = (4 * 83, 4 * 83 * 4, None) if DEVICE == "cpu" else (None,)
    for path in ("score", "frozen", "recompute"):
        for max_bytes in budgets:
            # A frozen head has no room in them for what it keeps: it recomputes.
            impl = "auto" if path == "frozen" else path
            call = {"impl": impl, "engine": "triton", "max_bytes": max_bytes}
            seen.append(run(token_logps, leaves, targets, g, options, path, **call)[0])
    assert all(torch.equal(seen[0], other) for other in seen)


def pairs_of(counts, leaves, targets):
    n = sum(counts)
    rows = torch.arange(n, device=DEVICE)
    lengths = torch.tensor(counts, device=DEVICE)
    return TokenSelection(rows, targets, lengths, tuple(counts))


def run_pairs(leaves, targets, options, objective, dtype=None, **kwargs):
    counts = (3, 2, 0, 1, 2, 1)
    hidden, weight, bias = (
        None if t is None else t.to(dtype or t.dtype, copy=True).requires_grad_() for t in leaves
    )
    ref = torch.linspace(-30, -5, 6, device=DEVICE).to(dtype or torch.float32)
    out = pair_loss(
        hidden, LmHead(weight, bias, **options), pairs_of(counts, leaves, targets), objective,
        ref_logps=ref, **kwargs,
    )  # fmt: skip
    out.loss.backward()
    return out, [t.grad for t in (hidden, weight, bias) if t is not None]


@pytest.mark.parametrize(
    ("loss", "head"), [*(("dpo", h) for h in HEADS), ("slic", "plain"), ("slic", "everything")]
)
@pytest.mark.parametrize(
    ("path", "rows"),
    [
        pytest.param("single_pass", None, id="single-pass"),
        pytest.param("single_pass", 2, id="single-pass-long-pairs"),
        pytest.param("recompute", 4, id="recompute"),
    ],
)
def test_pair_loss_in_triton(small_blocks, path, rows, loss, head):
    leaves, targets, options = problem(head=head)
    # A satisfied hinge gives a pair the coefficient 0: SLiC's second and third pair.
    objective = Objective.parse(loss)
    call = (leaves, targets, options, objective)
    with tiles_of(rows, 83):
        out, grads = run_pairs(*call, impl=path, engine="triton", stats=path == "single_pass")
    truth, wide = run_pairs(*call, dtype=torch.float64, impl="reference", stats=True)
    torch.testing.assert_close(out.losses.double(), truth.losses, rtol=1e-5, atol=1e-4)
    for got, want in zip(grads, wide, strict=True):
        assert (got.double() - want).norm() <= 3e-6 * want.norm() + 1e-9
    if out.stats is not None:
        for name, got, want in zip(TokenStats._fields, out.stats, truth.stats, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, msg=name)


def test_pairs_without_a_coefficient_leave_the_products():
    leaves, targets, options = problem()
    objective = Objective.parse("slic", delta=1e-3)
    _, grads = run_pairs(leaves, targets, options, objective, engine="triton")
    active = grads[0].abs().sum(1) > 0
    assert 0 < int(active.sum()) < 9


def test_policy_and_reference_of_equal_weights_have_no_margin():
    leaves, targets, _ = problem(dtype="bf16")
    selection = pairs_of((3, 2, 1, 3), leaves, targets)
    hidden, head = leaves[0].requires_grad_(), LmHead(leaves[1].requires_grad_())
    with torch.no_grad():
        budget = 4 * 83 * 2 if DEVICE == "cpu" else None
        ref = head_logps(hidden, head, targets, engine="triton", max_bytes=budget)
    for path in ("single_pass", "recompute"):
        out = pair_loss(
            hidden, head, selection, Objective.parse("dpo"), impl=path, engine="triton",
            ref_logps=sequence_logps(ref, selection.lengths),
        )  # fmt: skip
        assert torch.equal(out.losses, torch.full((2,), 2.0, device=DEVICE).log())


def test_token_stats_in_triton(within_budget, small_blocks):
    leaves, targets, options = problem(head="everything")
    head = LmHead(leaves[1], leaves[2], **options)
    logps, stats = token_stats(leaves[0], head, targets, engine="triton")
    hidden, weight, bias = leaves
    eager = reference.token_stats(hidden, weight, targets, bias=bias, **options)
    wide = (t.double() for t in (hidden, weight))
    truth = reference.token_stats(*wide, targets, bias=bias.double(), **options)
    for name, *values in zip(TokenStats._fields, stats, eager, truth, strict=True):
        within_budget(name, *values, 120)
    assert torch.equal(logps, head_logps(hidden, head, targets, engine="triton"))


class Linear:
    """Sends any gradient through a pair loss: the reference is the coefficients."""

    needs_ref, coupled, sparse, has_token_level = True, False, False, False

    def __call__(self, policy: PairLogps, ref: PairLogps, totals, token_losses):
        return (ref.chosen * policy.chosen + ref.rejected * policy.rejected) * totals.pairs


@pytest.mark.parametrize("path", ["frozen", "recompute", "single_pass"])
@pytest.mark.parametrize(
    ("dtype", "scale", "options"),
    [
        pytest.param("bf16", 1.0, {}, id="bf16"),
        pytest.param("bf16", 1.0, {"softcap": 3.0, "logit_scale": 0.7}, id="bf16-softcap"),
        pytest.param("fp16", 1e-8, {}, id="fp16-tiny-coefficients"),
        pytest.param("fp16", 1e6, {}, id="fp16-large-coefficients"),
        pytest.param("fp16", 1.0, {"temperature": 1e-2, "softcap": 0.1}, id="fp16-steep"),
        pytest.param("fp16", 0.0, {}, id="fp16-no-coefficient"),
    ],
)
def test_gradients_of_half_precision_over_their_own_logits(
    half_factors, small_blocks, path, dtype, scale, options
):
    n, d, v = 12, 16, 211
    spread = 5e-3 if "temperature" in options else 0.5
    hidden, weight = torch.randn(n, d, device=DEVICE) * spread, torch.randn(v, d, device=DEVICE)
    hidden, weight = (t.to(DTYPES[dtype]).float() for t in (hidden, weight))
    targets = torch.randint(v, (n,), device=DEVICE)
    g = scale * (1 + torch.rand(n, device=DEVICE))
    call = ([hidden, weight, None], targets, g, options, path)
    truth = run(reference.token_logps, *call, dtype=torch.float64)[1:]
    half_factors(DTYPES[dtype])
    if path == "single_pass":
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        out = pair_loss(
            leaves[0], LmHead(leaves[1], **options), pairs_of((1,) * n, leaves, targets), Linear(),
            ref_logps=g, engine="triton",
        )  # fmt: skip
        out.loss.backward()
        grads = [t.grad for t in leaves]
    else:
        grads = run(token_logps, *call, impl=path, engine="triton")[1:]
    for got, want in zip(grads, truth, strict=True):
        error = (got.double() - want).norm()
        # Truncation to bf16 is twice as coarse as rounding, and it does not average out.
        assert error <= (2e-3 if dtype == "fp16" else 8e-3) * want.norm()


# Statistics and slopes in one read


def slopes_truth(z, targets, **options) -> Tensor:
    """``d logp / d z`` by the raw products beside the targets, in fp64."""
    truth = gradient_truth(z, targets, torch.ones_like(z[:, 0]), **options)
    return truth.scatter_(1, targets[:, None], 0.0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("r", "v"), [(1, 1), (3, 2), (5, 64), (5, 65), (4, 203)])
def test_slopes_against_fp64(poisoned, r, v, head, dtype):
    z, targets, options = rows_of(r, v, head)
    before, out = z.clone(), torch.empty_like(z, dtype=DTYPES[dtype])
    rows, factors = take_row_slopes(z, targets, out, stats=True, config=SMALL, **options)
    assert torch.equal(z, before)
    want = take_row_statistics(z, targets, stats=True, config=SMALL, **options)
    assert all(torch.equal(a, b) for a, b in zip(rows, want, strict=True))
    truth = slopes_truth(z, targets, **options)
    got = factors.double()[:, None] * out.double()
    allowed = (UNIT[dtype] + 4e-6) * truth.abs() + 1e-7 * truth.abs().amax(dim=1, keepdim=True)
    assert ((got - truth).abs() <= allowed + 1e-12).all()


@pytest.mark.parametrize("v", [30000, 24577], ids=["multiple-of-16", "odd"])
def test_all_variants_give_a_row_the_same_bits(v):
    """A policy's gradient, its metrics, a reference in tiles or in rows that are not aligned."""
    z, targets, _ = rows_of(3, v, spread=6.0)
    want = take_row_statistics(z, targets)
    slopes = torch.empty_like(z, dtype=torch.bfloat16)
    moved = torch.empty(3, v + 3, device=DEVICE)[:, 3:].copy_(z)
    split = configs.row_config("row_statistics", z.device).split_v
    tiles = [
        take_row_states(z[:, start : start + split].contiguous(), targets, first_column=start)
        for start in range(0, v, split)
    ]
    for got in (
        take_row_statistics(z, targets, stats=True), take_row_slopes(z, targets, slopes)[0],
        take_row_slopes(z, targets, slopes, stats=True)[0], take_row_statistics(moved, targets),
        merge_splits(torch.cat(tiles), targets, v),
    ):  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))


# Ratios to the least likely targets overflow, and their rows are written once more.
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("below", [20.0, 31.0, 33.0, 100.0, 1000.0])
@pytest.mark.parametrize("head", ["plain", "everything"])
def test_slopes_of_targets_however_unlikely(poisoned, below, head):
    z, targets, options = rows_of(6, 203, head)
    if head == "plain":  # a cap keeps logits near each other
        z[2, targets[2]] = z[2].amax() - below
        z[4, targets[4]] = z[4].amax() + 20.0
    out = torch.empty_like(z, dtype=torch.bfloat16)
    rows, factors = take_row_slopes(z, targets, out, config=SMALL, **options)
    likely = torch.where(rows.logps > -32, rows.logps.exp(), 1.0)
    torch.testing.assert_close(factors, likely, rtol=5e-6, atol=0.0)
    truth = slopes_truth(z, targets, **options)
    got = factors.double()[:, None] * out.double()
    finite = truth.isfinite()
    assert finite.sum() >= truth.numel() - 203
    error = (got - truth)[finite].abs()
    assert (error <= 1.01 * 2.0**-7 * truth[finite].abs() + 1e-30).all()


def test_slopes_of_unlikely_targets_are_those_by_the_raw_products():
    """A row that is written once more has the slope of its logits, too."""
    z, targets, _ = rows_of(4, 203)
    z[1, targets[1]] = z[1].amax() - 20.0
    out, options = torch.empty_like(z, dtype=torch.bfloat16), {"logit_scale": 3.0}
    rows, factors = take_row_slopes(z, targets, out, config=SMALL, **options)
    assert rows.logps[1] < -32 and factors[1] == 1.0
    truth = slopes_truth(z, targets, **options)
    error = (factors.double()[:, None] * out.double() - truth).abs()
    assert (error <= 1.01 * 2.0**-7 * truth.abs() + 1e-30).all()


@pytest.mark.parametrize("columns", [1, 63, 64, 130])
def test_slopes_of_the_first_columns_alone(poisoned, columns):
    z, targets, options = rows_of(5, 203, "everything")
    z[1, targets[1]] = z[1].amin() - 100.0  # its row is written once more
    store = torch.full((5, 256), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    got = take_row_slopes(z, targets, store[:, :columns], config=SMALL, **options)
    whole = torch.empty_like(z, dtype=torch.bfloat16)
    want = take_row_slopes(z, targets, whole, config=SMALL, **options)
    assert torch.equal(got[0].logps, want[0].logps) and torch.equal(got[1], want[1])
    assert torch.equal(store[:, :columns], whole[:, :columns]) and store[:, columns:].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid:RuntimeWarning")
def test_slopes_of_an_excluded_target(poisoned):
    z, targets, _ = rows_of(3, 203)
    z[1, targets[1]] = -torch.inf
    out = torch.empty_like(z, dtype=torch.bfloat16)
    rows, factors = take_row_slopes(z, targets, out, config=SMALL)
    assert rows.logps[1] == -torch.inf and factors[1] == 1.0
    torch.testing.assert_close(out[1].float(), -z[1].softmax(0), rtol=1e-2, atol=1e-6)


@pytest.mark.filterwarnings("ignore:(invalid|divide):RuntimeWarning")
def test_slopes_of_broken_rows_say_so_and_leave_the_others_alone():
    z, targets, _ = rows_of(6, 40)
    z[1, 7], z[2, 7] = torch.nan, torch.inf
    targets[3], targets[4] = -1, 40
    out = torch.empty_like(z, dtype=torch.bfloat16)
    _, factors = take_row_slopes(z, targets, out, config=SMALL)
    got = factors[:, None] * out.float()
    assert all(row.isnan().any() for row in got[1:5])
    truth = slopes_truth(z[[0, 5]], targets[[0, 5]])
    torch.testing.assert_close(got[[0, 5]].double(), truth, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"dtype": torch.float16}, {"size": (4, 41)}, {"size": (3, 40)}],
    ids=["fp16", "columns", "rows"],
)
def test_slopes_that_cannot_be_written_are_refused(change):
    z, targets, _ = rows_of(4, 40)
    out = torch.empty(change.get("size", (4, 40)), dtype=change.get("dtype"), device=DEVICE)
    with pytest.raises(ValueError, match=r"slopes: expected \[4, 40\] of bf16 or fp32"):
        take_row_slopes(z, targets, out)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["as-is", "reversed"])
def test_sums_of_lanes_do_not_depend_on_their_order(order):
    """How lanes lie in threads is up to the compiler, and differs between variants of a kernel."""
    lanes = torch.rand(512, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 6
    index = (
        torch.arange(512, device=DEVICE).flip(0) if order.step else torch.arange(512, device=DEVICE)
    )
    out = torch.empty(2, device=DEVICE)
    _sum_kernel[(1,)](lanes[index].contiguous(), out, BLOCK=512)
    assert out[0].item() == pytest.approx(lanes.double().sum().item(), rel=6e-8)
    again = torch.empty(2, device=DEVICE)
    _sum_kernel[(1,)](lanes, again, BLOCK=512)
    assert torch.equal(out, again)


@triton.jit
def _sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, exact_sum(x))
    tl.store(out_ptr + 1, exact_sum(-x))


# The choice of the engine


def plan(device, **kwargs):
    return plan_head(50257, device, hidden_grad=True, head_grad=True, **kwargs)


def test_an_engine_that_cannot_serve_raises(monkeypatch):
    with pytest.raises(ValueError, match=r"engine: expected one of 'auto'.*got 'fast'"):
        plan("cuda", engine="fast")
    with pytest.raises(ValueError, match="got impl='reference'"):
        plan("cuda", engine="triton", impl="reference")
    with pytest.raises(ValueError, match="expected tensors on a CUDA device, got meta"):
        plan("meta", engine="triton")
    h, w, t = (torch.zeros(2, 3, device=DEVICE).double() for _ in range(3))
    with pytest.raises(ValueError, match=r"expected fp32 logits .* got torch\.float64"):
        token_logps(h, w, t[:, 0].long(), engine="triton")
    monkeypatch.setattr(configs, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"got cpu .*TRITON_INTERPRET=1"):
        plan("cpu", engine="triton")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a)
    )
    with pytest.raises(ImportError, match=r"pip install 'fastdaa\[triton\]'"):
        plan("cuda", engine="triton")


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["score", "frozen", "recompute"])
@pytest.mark.parametrize("v", [50257, 128256])
def test_engines_agree_on_a_gpu_in_bf16(path, v):
    n, d = 300, 512
    weight = (torch.randn(v, d, device=DEVICE) * d**-0.5).bfloat16()
    targets = torch.randint(v, (n,), device=DEVICE)
    hidden = (weight[targets].float() * 16 + torch.randn(n, d, device=DEVICE) * 2).bfloat16()
    g = torch.randn(n, device=DEVICE)
    results = [
        run(token_logps, [hidden, weight, None], targets, g, {}, path, impl=path, engine=engine)
        for engine in ("torch", "triton", "triton")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))
    # Their products have other widths, and may come from other kernels of the library.
    assert (results[0][0] - results[1][0]).abs().max() < 3e-5
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        assert (a.float() - b.float()).norm() <= 4e-3 * a.float().norm()
