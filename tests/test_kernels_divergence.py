"""The divergence kernels against materialised logits in fp64.

Without a GPU they run in Triton's interpreter (conftest.py).
"""

from __future__ import annotations

import math

import pytest
import torch

from fastdaa import reference

triton = pytest.importorskip("triton")

from fastdaa.kernels.divergence import (  # noqa: E402
    HeadOptions,
    TokenDivergences,
    token_divergences,
)
from fastdaa.kernels.score_configs import TileConfig  # noqa: E402

# The interpreter computes masked entries too, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POINTERS = TileConfig(16, 32, 16, 4, 2, split_v=64, group_n=2)
CONFIGS = {
    "pointers": POINTERS,
    "descriptors": POINTERS._replace(tma=True),
    "halves": POINTERS._replace(parts=2, split_v=4096),
}
NONE = HeadOptions()
CAPPED = HeadOptions(1.3, 4.0, 0.8)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that a kernel has to fill holds NaN before."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()


def heads(n, d, ref_d, v, distance=1.0, dtype=torch.float32):
    """Policy and reference operands; with equal sizes, ``distance`` apart."""
    hidden, weight = torch.randn(n, d), torch.randn(v, d) * d**-0.5 * 3
    if d == ref_d and distance < 1:
        ref_hidden = hidden + distance * torch.randn(n, d)
        ref_weight = weight + distance * torch.randn(v, d) * d**-0.5
    else:
        ref_hidden, ref_weight = torch.randn(n, ref_d), torch.randn(v, ref_d) * ref_d**-0.5 * 3
    return [t.to(dtype).to(DEVICE) for t in (hidden, weight, ref_hidden, ref_weight)]


def logits(hidden, weight, bias, options, dtype):
    bias = None if bias is None else bias.to(dtype)
    return reference.logits(hidden.to(dtype), weight.to(dtype), bias=bias, **options._asdict())


def expected(operands, dtype, bias=None, ref_bias=None, options=NONE, ref_options=NONE):
    policy = logits(*operands[:2], bias, options, dtype)
    ref = logits(*operands[2:], ref_bias, ref_options, dtype)
    mixture = torch.logaddexp(policy.log_softmax(1), ref.log_softmax(1)) - math.log(2)
    kl = reference.kl_divergence
    return TokenDivergences(
        kl(policy, ref), kl(ref, policy), (kl(policy, mixture) + kl(ref, mixture)) / 2
    )


def check(within_budget, got, operands, **head):
    eager = expected(operands, torch.float32, **head)
    truth = expected(operands, torch.float64, **head)
    for name, ours, theirs, right in zip(TokenDivergences._fields, got, eager, truth, strict=True):
        if ours is not None:
            # The budget's slack follows the result; a divergence near 0 has the logits' errors.
            within_budget(name, ours + 1, theirs + 1, right + 1, operands[1].numel())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("sizes", "head"),
    [
        pytest.param((21, 48, 48, 203, 0.1), {}, id="close"),
        pytest.param((21, 48, 32, 203), {}, id="far"),
        pytest.param((17, 32, 16, 97), {"options": CAPPED}, id="policy-capped"),
        pytest.param((5, 16, 48, 65), {"options": CAPPED, "ref_options": CAPPED}, id="both-capped"),
    ],
)
def test_as_accurate_as_plain_torch(within_budget, config, sizes, head):
    operands = heads(*sizes)
    bias = {"bias": torch.randn(sizes[3], device=DEVICE)} if head else {}
    got = token_divergences(*operands, **bias, **head, js=True, config=CONFIGS[config])
    check(within_budget, got, operands, **bias, **head)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((1, 80, 80, 131), id="one-row"),
        pytest.param((3, 4, 4, 1), id="one-column"),
        pytest.param((3, 4, 4, 2), id="two-columns"),
        pytest.param((16, 16, 16, 64), id="whole-tiles"),
        pytest.param((35, 8, 8, 323), id="many-splits"),
        pytest.param((5, 37, 23, 97), id="odd-hidden-sizes"),
    ],
)
def test_shapes_that_divide_nothing(within_budget, sizes):
    operands = heads(*sizes)
    got = token_divergences(*operands, js=True, config=CONFIGS["descriptors"])
    check(within_budget, got, operands)


def test_half_precision_operands(within_budget):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    operands = heads(19, 48, 32, 203, dtype=dtype)
    got = token_divergences(*operands, js=True, config=CONFIGS["descriptors"])
    check(within_budget, got, operands)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "sizes", [(300, 576, 576, 50257, 0.1), (129, 512, 320, 128256)], ids=["gpt2", "llama3"]
)
def test_the_table_on_a_gpu(within_budget, sizes, dtype):
    operands = heads(*sizes, dtype=dtype)
    check(within_budget, token_divergences(*operands, js=True), operands)


def test_equal_heads_are_at_a_distance_of_zero():
    operands = heads(9, 16, 16, 300)
    same = operands[:2] * 2
    got = token_divergences(*same, js=True, config=POINTERS)
    assert all((values == 0).all() for values in got)


def test_close_heads_keep_their_js_digits():
    """It is of second order in the distance: a difference of logs would lose it."""
    operands = heads(9, 16, 16, 300, 0.003)
    got = token_divergences(*operands, js=True, config=POINTERS).js
    truth = expected(operands, torch.float64).js
    assert (truth < 1e-4).all()
    torch.testing.assert_close(got.double(), truth, rtol=1e-3, atol=0)


def test_a_common_offset_changes_nothing():
    operands = [torch.randint(-2, 3, t.shape, device=DEVICE).float() for t in heads(7, 16, 16, 90)]
    bias = torch.full((90,), 2.0**22, device=DEVICE)
    near = token_divergences(*operands, js=True, config=POINTERS)
    far = token_divergences(*operands, bias=bias, ref_bias=-bias, js=True, config=POINTERS)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_heads_that_exclude_the_same_columns():
    """Single columns, whole tiles, and the whole first split."""
    operands = heads(6, 16, 16, 300)
    bias = torch.zeros(300, device=DEVICE)
    bias[:70] = bias[130] = bias[160:200] = -math.inf
    got = token_divergences(*operands, bias=bias, ref_bias=bias, js=True, config=POINTERS)
    kept = bias == 0
    truth = expected(
        (operands[0], operands[1][kept], operands[2], operands[3][kept]), torch.float64
    )
    for values, right in zip(got, truth, strict=True):
        torch.testing.assert_close(values.double(), right, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "excluded",
    [
        pytest.param([200], id="one"),
        pytest.param(range(64), id="the-first-split"),
        pytest.param(range(65, 299), id="most"),
    ],
)
def test_a_reference_that_excludes_more_is_infinitely_far(excluded):
    """KL(policy || ref) is infinite, the others are not; later maxima do not undo it."""
    operands = heads(6, 16, 16, 300)
    operands[1][-1] *= 40  # the last column may lie far above all others
    bias = torch.zeros(300, device=DEVICE)
    bias[list(excluded)] = -math.inf
    got = token_divergences(*operands, ref_bias=bias, js=True, config=POINTERS)
    assert (got.kl == math.inf).all()
    swapped = token_divergences(*operands[2:], *operands[:2], bias=bias, config=POINTERS)
    assert (swapped.reverse_kl == math.inf).all()
    truth = expected(operands, torch.float64, ref_bias=bias)
    policy = logits(*operands[:2], None, NONE, torch.float64).log_softmax(1)
    ref = logits(*operands[2:], bias, NONE, torch.float64).log_softmax(1)
    kept = bias == 0
    reverse = (ref[:, kept].exp() * (ref - policy)[:, kept]).sum(1)
    for values in (got.reverse_kl, swapped.kl):
        torch.testing.assert_close(values.double(), reverse, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(got.js.double(), truth.js, rtol=3e-6, atol=3e-6)
    assert (got.js > 0).all() and (got.js <= math.log(2) + 1e-6).all()


def test_disjoint_heads_are_ln_2_apart():
    operands = heads(4, 16, 16, 100)
    bias, ref_bias = torch.zeros(2, 100, device=DEVICE)
    bias[:50] = ref_bias[50:] = -math.inf
    got = token_divergences(*operands, bias=bias, ref_bias=ref_bias, js=True, config=POINTERS)
    torch.testing.assert_close(got.js, torch.full_like(got.js, math.log(2)), rtol=2e-6, atol=0)
    assert (got.kl == math.inf).all() and (got.reverse_kl == math.inf).all()


def test_a_row_has_the_same_bits_in_every_batch():
    operands = heads(37, 16, 32, 203)
    whole = token_divergences(*operands, js=True, config=POINTERS)
    again = token_divergences(*operands, js=True, config=POINTERS, programs=7)
    row = (operands[0][20:21], operands[1], operands[2][20:21], operands[3])
    part = token_divergences(*row, js=True, config=POINTERS)
    for values, repeated, single in zip(whole, again, part, strict=True):
        assert torch.equal(values, repeated) and torch.equal(values[20:21], single)


def test_biases_with_gaps():
    operands = heads(9, 16, 32, 70)
    bias, ref_bias = torch.randn(2, 140, device=DEVICE)[:, ::2]
    got = token_divergences(*operands, bias=bias, ref_bias=ref_bias, js=True, config=POINTERS)
    biases = {"bias": bias.contiguous(), "ref_bias": ref_bias.contiguous()}
    right = token_divergences(*operands, **biases, js=True, config=POINTERS)
    assert all(map(torch.equal, got, right))


def test_no_token_and_no_js():
    operands = heads(3, 8, 8, 5)
    got = token_divergences(operands[0][:0], operands[1], operands[2][:0], operands[3], js=True)
    assert all(values.shape == (0,) for values in got)
    assert token_divergences(*operands, config=POINTERS).js is None


@pytest.mark.parametrize(
    ("position", "tensor", "message"),
    [
        pytest.param(2, torch.zeros(4, 8), "same positions", id="positions"),
        pytest.param(3, torch.zeros(6, 8), "same positions and vocabulary", id="vocabulary"),
        pytest.param(2, torch.zeros(3, 9), "ref_hidden_states", id="sizes"),
        pytest.param(1, torch.zeros(5, 8).half(), "one dtype", id="mixed"),
        pytest.param(0, torch.zeros(3, 16)[:, :8], "contiguous", id="gaps"),
        pytest.param(3, torch.zeros(5, 8, device="meta"), "device", id="elsewhere"),
    ],
)
def test_operands_that_do_not_fit(position, tensor, message):
    operands = [torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(3, 8), torch.zeros(5, 8)]
    operands[position] = tensor
    with pytest.raises(ValueError, match=message):
        token_divergences(*operands)
