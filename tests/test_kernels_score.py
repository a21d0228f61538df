"""The score kernel against fp64: odd shapes, both ways to read operands, and the hard rows.

Without a GPU it runs in Triton's interpreter (conftest.py), whose bf16 products are wrong: bf16 is
tested where there is one.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastdaa import reference

triton = pytest.importorskip("triton")

from fastdaa.kernels import operands, score_configs  # noqa: E402
from fastdaa.kernels.merge_splits import RowStatistics  # noqa: E402
from fastdaa.kernels.score import score_tokens  # noqa: E402
from fastdaa.kernels.score_configs import (  # noqa: E402
    DIVERGENCE_CONFIGS,
    SCORE_CONFIGS,
    TileConfig,
    tile_config,
)

# The interpreter computes masked entries too, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POINTERS = TileConfig(16, 32, 16, 4, 2, split_v=64, group_n=2)
CONFIGS = {
    "pointers": POINTERS,
    "descriptors": POINTERS._replace(tma=True),
    "halves": POINTERS._replace(parts=2),
    "quarters": POINTERS._replace(block_v=64, parts=4, group_n=1),
    "one-split": POINTERS._replace(split_v=4096),
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "negative-scale": {"logit_scale": -1.5},
    "everything": {"bias": True, "softcap": 3.0, "logit_scale": 1.6, "temperature": 0.8},
}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that a kernel has to fill holds NaN before."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()


def problem(n, d, v, head="plain", dtype=torch.float32, spread=1.0):
    """Operands with the last column among the targets, and head options."""
    options = dict(HEADS[head])
    if options.pop("bias", False):
        options["bias"] = torch.randn(v, device=DEVICE)
    hidden = (torch.randn(n, d, device=DEVICE) * spread).to(dtype)
    weight = (torch.randn(v, d, device=DEVICE) * d**-0.5 * 4).to(dtype)
    targets = torch.randint(v, (n,), device=DEVICE)
    targets[0] = v - 1
    return hidden, weight, targets, options


def expected(hidden, weight, targets, dtype, **options) -> RowStatistics:
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = options.pop("bias", None)
    options["bias"] = None if bias is None else bias.to(dtype)
    z = reference.logits(hidden, weight, **options)
    logps = z.log_softmax(dim=1)
    target = targets[:, None]
    stats = reference.token_stats(hidden, weight, targets, **options)
    log_s = z.logsumexp(dim=1) - z.amax(dim=1)
    return RowStatistics(
        z.amax(dim=1), log_s, logps.gather(1, target)[:, 0], z.gather(1, target)[:, 0],
        *stats,
    )  # fmt: skip


def check(within_budget, got, hidden, weight, targets, options) -> None:
    eager = expected(hidden, weight, targets, torch.float32, **options)
    truth = expected(hidden, weight, targets, torch.float64, **options)
    length = weight.numel() // len(weight) + len(weight)
    for name, ours, theirs, right in zip(RowStatistics._fields, got, eager, truth, strict=True):
        if ours is not None:
            within_budget(name, ours, theirs, right, length)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("config", CONFIGS)
def test_as_accurate_as_plain_torch(within_budget, config, head):
    hidden, weight, targets, options = problem(21, 48, 203, head)
    got = score_tokens(hidden, weight, targets, stats=True, config=CONFIGS[config], **options)
    check(within_budget, got, hidden, weight, targets, options)


@pytest.mark.parametrize("config", ["pointers", "descriptors"])
@pytest.mark.parametrize(
    ("n", "d", "v"),
    [
        pytest.param(1, 80, 131, id="one-row"),
        pytest.param(16, 16, 64, id="whole-tiles"),
        pytest.param(17, 20, 65, id="one-more"),
        pytest.param(3, 4, 1, id="one-column"),
        pytest.param(3, 4, 2, id="two-columns"),
        pytest.param(35, 8, 523, id="many-splits"),
        pytest.param(5, 37, 97, id="odd-hidden-size"),
        pytest.param(2, 1, 33, id="smallest-hidden-size"),
    ],
)
def test_shapes_that_divide_nothing(within_budget, n, d, v, config):
    hidden, weight, targets, options = problem(n, d, v, "bias")
    got = score_tokens(hidden, weight, targets, stats=True, config=CONFIGS[config], **options)
    check(within_budget, got, hidden, weight, targets, options)


def test_without_statistics_the_rest_is_the_same():
    hidden, weight, targets, options = problem(9, 16, 150, "everything")
    lean = score_tokens(hidden, weight, targets, config=POINTERS, **options)
    full = score_tokens(hidden, weight, targets, stats=True, config=POINTERS, **options)
    assert lean[4:] == (None,) * 4
    assert all(torch.equal(a, b) for a, b in zip(lean[:4], full[:4], strict=True))


def test_no_token():
    hidden, weight, targets, _ = problem(1, 8, 5)
    got = score_tokens(hidden[:0], weight, targets[:0], stats=True)
    assert all(values.shape == (0,) for values in got)


@pytest.mark.parametrize("config", ["pointers", "descriptors"])
def test_half_precision_operands(within_budget, config):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    hidden, weight, targets, _ = problem(19, 48, 203, dtype=dtype)
    got = score_tokens(hidden, weight, targets, stats=True, config=CONFIGS[config])
    check(within_budget, got, hidden, weight, targets, {})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stats", [False, True], ids=["lean", "stats"])
@pytest.mark.parametrize(
    ("n", "d", "v"), [(300, 576, 50257), (129, 512, 128256)], ids=["gpt2", "llama3"]
)
def test_the_table_on_a_gpu(within_budget, n, d, v, stats, dtype):
    hidden, weight, targets, _ = problem(n, d, v, dtype=dtype)
    got = score_tokens(hidden, weight, targets, stats=stats)
    check(within_budget, got, hidden, weight, targets, {})


def test_padded_columns_do_not_leak():
    """A zero among logits near -1000 would take all of the probability."""
    hidden, weight, targets, _ = problem(5, 16, 97)
    bias = torch.full((97,), -1000.0, device=DEVICE)
    shifted = score_tokens(hidden, weight, targets, bias=bias, stats=True, config=POINTERS)
    plain = score_tokens(hidden, weight, targets, stats=True, config=POINTERS)
    torch.testing.assert_close(shifted.logps, plain.logps, atol=2e-4, rtol=0)
    torch.testing.assert_close(shifted.entropy, plain.entropy, atol=2e-4, rtol=0)
    torch.testing.assert_close(shifted.m, plain.m - 1000, atol=2e-4, rtol=0)


def test_a_common_offset_changes_nothing():
    """Logits that are small integers stay exact under an offset that leaves no digit to spare."""
    hidden = torch.randint(-2, 3, (7, 16), device=DEVICE).float()
    weight = torch.randint(-2, 3, (90, 16), device=DEVICE).float()
    targets = torch.arange(7, device=DEVICE)
    for offset in (2.0**22, -(2.0**22)):
        bias = torch.full((90,), offset, device=DEVICE)
        far = score_tokens(hidden, weight, targets, bias=bias, stats=True, config=POINTERS)
        near = score_tokens(hidden, weight, targets, stats=True, config=POINTERS)
        for name in ("log_s", "logps", "entropy", "top1", "log_sum_sq"):
            assert torch.equal(getattr(far, name), getattr(near, name)), name


@pytest.mark.parametrize("config", ["pointers", "descriptors", "quarters"])
def test_excluded_columns(within_budget, config):
    """Columns of -inf: single ones, whole tiles, the whole first split, and a target."""
    hidden, weight, targets, _ = problem(6, 16, 300)
    bias = torch.zeros(300, device=DEVICE)
    bias[:70] = -math.inf
    bias[130] = bias[160:200] = -math.inf
    targets[:] = torch.tensor([299, 71, 129, 131, 220, 130], device=DEVICE)
    got = score_tokens(
        hidden, weight, targets, bias=bias, stats=True, config=CONFIGS[config]
    )  # fmt: skip
    truth = expected(hidden, weight, targets, torch.float64, bias=bias)
    for name in ("m", "log_s", "logps", "entropy", "log_sum_sq"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(truth, name), atol=1e-5, rtol=1e-5
        )
    assert got.logps[5] == -math.inf and got.target_logit[5] == -math.inf
    assert torch.equal(got.top1.double(), truth.top1)


def test_a_row_without_any_logit_is_as_in_torch():
    hidden, weight, targets, _ = problem(3, 16, 70)
    bias = torch.full((70,), -math.inf, device=DEVICE)
    got = score_tokens(hidden, weight, targets, bias=bias, config=POINTERS)
    assert got.logps.isnan().all() and (got.m == 0).all()


def test_confident_targets_keep_their_digits():
    """The log-prob of a token that is all but certain is the others' mass, to a relative error."""
    v, gaps = 101, torch.tensor([5.0, 15.0, 18.0, 30.0, 60.0], device=DEVICE)
    hidden = torch.zeros(5, 16, device=DEVICE)
    hidden[:, 0] = gaps
    weight = torch.zeros(v, 16, device=DEVICE)
    weight[40, 0] = 1.0
    targets = torch.full((5,), 40, device=DEVICE)
    got = score_tokens(hidden, weight, targets, stats=True, config=POINTERS)
    rest = (v - 1) * torch.exp(-gaps.double())
    torch.testing.assert_close(got.logps.double(), -rest.log1p(), rtol=3e-6, atol=0)
    entropy = rest.log1p() + gaps.double() * rest / (1 + rest)
    torch.testing.assert_close(got.entropy.double(), entropy, rtol=3e-6, atol=0)
    assert (got.top1 == 1).all()


@pytest.mark.parametrize("other", [20, 21, 150], ids=["next", "same-tile", "another-split"])
def test_a_target_as_probable_as_another_is_a_hit(other):
    """As in plain torch: no other token is more probable."""
    hidden, weight, targets, _ = problem(3, 16, 203)
    weight[other] = weight[19] = 3.0 * hidden[0]
    targets[:] = torch.tensor([19, other, 7], device=DEVICE)
    hidden[1] = hidden[0]
    got = score_tokens(hidden, weight, targets, stats=True, config=POINTERS)
    assert got.top1.tolist() == reference.token_stats(hidden, weight, targets).top1.tolist()
    assert got.top1[:2].tolist() == [1.0, 1.0]


def test_targets_that_no_column_has():
    hidden, weight, targets, _ = problem(5, 16, 70)
    right = score_tokens(hidden, weight, targets, config=POINTERS).logps
    # 70 to 95 are padded columns of the last tile; 2^32 + 3 is 3 in 32 bits.
    wrong = torch.tensor([70, 95, -1, 2**32 + 3], device=DEVICE)
    targets[:4] = wrong
    got = score_tokens(hidden, weight, targets, config=POINTERS).logps
    assert got[:4].isnan().all() and torch.equal(got[4], right[4])


def test_nan_stays_in_its_row():
    hidden, weight, targets, _ = problem(5, 16, 70)
    clean = score_tokens(hidden, weight, targets, stats=True, config=POINTERS)
    hidden[2, 3] = math.nan
    got = score_tokens(hidden, weight, targets, stats=True, config=POINTERS)
    others = torch.tensor([0, 1, 3, 4], device=DEVICE)
    for name in ("log_s", "logps", "entropy", "mean_logit", "log_sum_sq"):
        values, before = getattr(got, name), getattr(clean, name)
        assert values[2].isnan() and torch.equal(values[others], before[others]), name


@pytest.mark.parametrize("config", ["pointers", "descriptors"])
def test_a_row_has_the_same_bits_in_every_batch(config):
    """However many rows come with it, and however many programs share the work."""
    hidden, weight, targets, _ = problem(37, 16, 203)
    config = CONFIGS[config]
    whole = score_tokens(hidden, weight, targets, stats=True, config=config)
    again = score_tokens(hidden, weight, targets, stats=True, config=config, programs=7)
    part = score_tokens(hidden[20:21], weight, targets[20:21], stats=True, config=config)
    for values, repeated, single in zip(whole, again, part, strict=True):
        assert torch.equal(values, repeated) and torch.equal(values[20:21], single)


@pytest.mark.parametrize("config", ["pointers", "halves", "quarters"])
def test_the_targets_of_other_rows_change_no_bit(config):
    """Tiles that hold a target are folded another way; the bits of rows without one stay."""
    hidden, weight, targets, options = problem(16, 32, 203, "everything")
    targets[:] = 200
    before = score_tokens(
        hidden, weight, targets, stats=True, config=CONFIGS[config], **options
    )  # fmt: skip
    targets[3:] = torch.arange(3, 16, device=DEVICE) * 13
    after = score_tokens(hidden, weight, targets, stats=True, config=CONFIGS[config], **options)
    for values, moved in zip(before, after, strict=True):
        assert torch.equal(values[:3], moved[:3])


def test_rows_with_gaps_and_operands_that_no_descriptor_reads():
    hidden, weight, targets, _ = problem(9, 32, 70)
    right = score_tokens(hidden[:, :20].contiguous(), weight[:, :20].contiguous(), targets,
                         config=POINTERS)  # fmt: skip
    for start in (0, 1):
        wide = torch.randn(9, 40, device=DEVICE)
        wide[:, start : start + 20] = hidden[:, :20]
        gaps = wide[:, start : start + 20]
        got = score_tokens(gaps, weight[:, :20], targets, config=CONFIGS["descriptors"])
        assert torch.equal(got.logps, right.logps)


def test_a_bias_and_targets_with_gaps():
    hidden, weight, targets, _ = problem(9, 32, 70)
    bias, spread = torch.randn(140, device=DEVICE)[::2], targets.repeat_interleave(2)[::2]
    got = score_tokens(hidden, weight, spread, bias=bias, config=POINTERS)
    right = score_tokens(hidden, weight, targets, bias=bias.contiguous(), config=POINTERS)
    assert torch.equal(got.logps, right.logps)


def test_offsets_beyond_32_bits():
    """Rows 2^30 apart: the third begins at 2^31."""
    storage = torch.empty(0, dtype=torch.float16, device=DEVICE)
    torch.use_deterministic_algorithms(False)  # leaves the gaps untouched
    storage = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE)
    apart = storage.as_strided((3, 16), (2**30, 1))
    hidden, weight, targets, _ = problem(3, 16, 3, dtype=torch.float16)
    right = score_tokens(hidden, weight, targets, config=POINTERS).logps
    apart.copy_(weight)
    assert torch.equal(score_tokens(hidden, apart, targets, config=POINTERS).logps, right)
    apart.copy_(hidden)
    assert torch.equal(score_tokens(apart, weight, targets, config=POINTERS).logps, right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"weight": torch.zeros(5, 8, dtype=torch.float16)}, "one dtype", id="mixed"),
        pytest.param({"hidden_states": torch.zeros(3, 9)}, r"\[N, D\] and \[V, D\]", id="sizes"),
        pytest.param({"weight": torch.zeros(0, 8)}, "above 0", id="empty"),
        pytest.param({"weight": torch.zeros(8, 5).T}, "contiguous rows", id="transposed"),
        pytest.param({"weight": torch.zeros(5, 8, device="meta")}, "device", id="elsewhere"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    operands = {"hidden_states": torch.zeros(3, 8), "weight": torch.zeros(5, 8)} | change
    with pytest.raises(ValueError, match=message):
        score_tokens(**operands, targets=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("table", [SCORE_CONFIGS, DIVERGENCE_CONFIGS], ids=["score", "divergence"])
def test_tables(table, monkeypatch):
    assert set(table) == {(a, h, s) for a in (80, 90, 100) for h in (0, 1) for s in (0, 1)}
    for (architecture, half, _), config in table.items():
        assert config.split_v % config.block_v == 0
        assert not config.tma or (architecture >= 90 and half)
    for architecture, half in ((a, h) for a in (80, 90, 100) for h in (False, True)):
        short, long = (SCORE_CONFIGS[architecture, half, long] for long in (False, True))
        assert short.block_v // short.parts == long.block_v // long.parts
    monkeypatch.setattr(score_configs, "_architecture", lambda device: 90)
    aligned, odd = torch.zeros(4, 8).half(), torch.zeros(4, 9).half()
    assert tile_config(table, False, (aligned,)) == table[90, True, False]
    assert tile_config(table, False, (aligned, odd)) == score_configs.ODD_ROWS[True]
    flat = torch.zeros(65).half()[1:].view(4, 16)  # even rows, but the first address is odd
    assert tile_config(table, False, (flat,)) == score_configs.ODD_ROWS[True]
    same = torch.zeros(1, 16).half().expand(4, 16)  # rows that overlap
    assert tile_config(table, False, (same,)) == table[80, True, False]
    wide = torch.zeros(4, 9)
    assert tile_config(table, True, (wide,)) == score_configs.ODD_ROWS[False]
    assert tile_config(table, False, (odd,), CONFIGS["descriptors"]) == POINTERS


@pytest.mark.parametrize(
    ("version", "fences"),
    [("3.4.0", False), ("3.5.1", True), ("3.10.0+git1a2b", True), ("4.0.0", True)],
)
def test_descriptors_need_a_triton_that_fences_copies(version, fences, monkeypatch):
    monkeypatch.setattr(operands, "_FENCED", operands._fences(version))
    monkeypatch.setattr(score_configs, "_architecture", lambda device: 90)
    config = tile_config(SCORE_CONFIGS, False, (torch.zeros(4, 16).half(),))
    assert config == SCORE_CONFIGS[90 if fences else 80, True, False]
