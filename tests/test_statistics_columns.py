"""Triton takes statistics of a few columns at a time: less memory, and the bits of whole rows."""

from __future__ import annotations

import pytest
import torch

from fastdaa import LmHead, Objective, TokenSelection, pair_loss, plan_head, slices, token_logps
from fastdaa.logps import token_stats
from fastdaa.slices import LEAST_RESULTS, STATISTICS_BYTES, logit_blocks, logit_columns

pytest.importorskip("triton")
from fastdaa.kernels import configs

N, D, V, SPLIT = 24, 16, 203, 32
LENGTHS = (5, 7, 0, 4, 6, 2)
MIB = 1 << 20


@pytest.fixture
def few_columns(monkeypatch):
    """Splits of 32 columns, and two of them at a time for 24 rows."""
    small = configs.RowConfig(16, 4, split_v=SPLIT)
    table = {"row_statistics": dict.fromkeys(configs.ARCHITECTURES, small)}
    monkeypatch.setattr(configs, "ROW_CONFIGS", configs.ROW_CONFIGS | table)
    monkeypatch.setattr(configs, "SPLIT_V", SPLIT)
    monkeypatch.setattr(slices, "STATISTICS_BYTES", 4 * N * 2 * SPLIT)
    monkeypatch.setattr(slices, "LEAST_RESULTS", N * 8)  # 203 is six splits and 11 columns
    assert logit_columns("triton", N, V) == 2 * SPLIT


@pytest.mark.parametrize("rows", [1, 98, 100, 512, 513, 832, 1024])
@pytest.mark.parametrize("width", [1, 12288, 50257, 50304, 128256, 151936, 262144])
def test_columns_are_whole_splits_of_which_none_leaves_a_gpu_idle(rows, width):
    """A product with few results is shared out to multiprocessors, in another order of its sums."""
    split, found = configs.SPLIT_V, logit_blocks("triton", rows, width)
    assert [columns.start for columns in found[1:]] == [columns.stop for columns in found[:-1]]
    assert (found[0].start, found[-1].stop) == (0, width)
    assert all(columns.start % split == 0 for columns in found)
    sizes = [columns.stop - columns.start for columns in found]
    assert len(sizes) == 1 or rows * min(sizes) >= LEAST_RESULTS
    assert 4 * rows * max(sizes) <= STATISTICS_BYTES + 4 * LEAST_RESULTS * (sizes[-1] > split)
    assert len(sizes) == 1 or 4 * rows * width > STATISTICS_BYTES
    assert logit_columns("torch", rows, width) == width


def test_every_table_entry_has_the_same_splits():
    """Policy and reference may be on different devices of a machine."""
    assert {c.split_v for c in configs.ROW_CONFIGS["row_statistics"].values()} == {configs.SPLIT_V}


@pytest.mark.parametrize("vocab_size", [50304, 128256, 151936, 256000])
@pytest.mark.parametrize("tokens", [512, 8192, 65536])
def test_a_score_on_a_gpu_takes_at_most_64_mib(vocab_size, tokens):
    plan = plan_head(
        vocab_size, "cuda", hidden_grad=False, head_grad=False, tokens=tokens, hidden_size=4096,
        operand=torch.bfloat16, engine="triton",
    )  # fmt: skip
    statistics = 2 * 4 * 3 * -(-vocab_size // configs.SPLIT_V) * tokens  # a few numbers a token
    assert plan.extra_bytes - statistics <= STATISTICS_BYTES + 4 * LEAST_RESULTS
    if tokens == 8192:
        assert plan.extra_bytes <= 64 * MIB


@pytest.mark.interpreter
@pytest.mark.parametrize("head", [{}, {"softcap": 4.0, "logit_scale": 0.5}], ids=["plain", "cap"])
def test_all_paths_have_the_same_bits(few_columns, head):
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((N, D), (V, D), (V,))
    )
    targets = torch.randint(V, (N,), generator=generator)
    options = {"bias": bias, **head}
    want = token_logps(hidden, weight, targets, engine="triton", **options)
    truth = token_logps(hidden.double(), weight.double(), targets, bias=bias.double(), **head)
    assert (want - truth).abs().max() < 2e-5
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    frozen = token_logps(leaves[0], weight, targets, engine="triton", impl="frozen", **options)
    again = token_logps(*leaves, targets, engine="triton", impl="recompute", **options)
    kept = token_logps(*leaves, targets, engine="triton", impl="single_pass", **options)
    full_head = LmHead(leaves[1], bias, head.get("softcap"), head.get("logit_scale", 1.0))
    out = pair_loss(
        leaves[0], full_head, TokenSelection(torch.arange(N), targets, torch.tensor(LENGTHS),
                                             LENGTHS),
        Objective.parse("dpo"), ref_token_logps=want, engine="triton",
    )  # fmt: skip
    for got in (frozen, again, kept, out.token_logps):
        assert torch.equal(got, want)
    assert torch.equal(out.losses, torch.full((3,), 2.0).log())
    logps, stats = token_stats(hidden, LmHead(weight, **options), targets, engine="triton")
    plain = token_stats(hidden, LmHead(weight, **options), targets, engine="torch")[1]
    assert torch.equal(logps, want)
    for got, expected in zip(stats, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
