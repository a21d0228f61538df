"""Slices of the vocabulary in recompute's backward pass: which tiles, and what they add up to."""

from __future__ import annotations

import pytest
import torch

from fastdaa import memory, tiles, token_logps
from fastdaa.call_size import CallSize
from fastdaa.slices import Slices, plan_slices

MIB = 1 << 20


def sliced(budget, tokens, columns=16384, **size):
    llama = {"width": 128256, "hidden_size": 4096, "operand": torch.bfloat16, **size}
    return plan_slices(
        CallSize(tokens=tokens, **llama), "triton", budget, columns,
        lambda bytes_, row: max(bytes_ // row // 256 * 256, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "tokens", "rows", "columns", "held"),
    [
        pytest.param(512, 8192, 8192, 16384, 512, id="at-once"),
        pytest.param(512, 16384, 16384, 8192, 512, id="at-once-narrower"),
        # 1 / 8192 + 1 / 12288 is less than 1 / 2048.
        pytest.param(512, 65536, 12288, 8192, 128 + 384, id="sums"),
        pytest.param(512, 0, 12288, 8192, 128 + 384, id="tokens-unknown"),
        # 2304 x 4096 results are below 2^24, they are rounded 32 MiB at a time.
        pytest.param(104, 8192, 8192, 2304, 72 + 32, id="scarce"),
    ],
)
def test_tiles_that_move_the_fewest_gradients(budget, tokens, rows, columns, held):
    found = sliced(budget * MIB, tokens)
    assert (found.rows, found.columns, found.held) == (rows, columns, held * MIB)


@pytest.mark.parametrize("dtypes", ["bf16", "fp32", "mixed"])
@pytest.mark.parametrize("tokens", [0, 1, 300, 100_000])
def test_tiles_stay_within_the_budget(dtypes, tokens):
    operand = torch.float32 if dtypes == "fp32" else torch.bfloat16
    own = torch.float32 if dtypes == "mixed" else None
    for budget in (1 * MIB, 20 * MIB, 900 * MIB):
        found = sliced(budget, tokens, operand=operand, weight_dtype=own, hidden_dtype=own)
        assert found.rows >= 1 and 1 <= found.columns <= 16384
        assert found.held <= budget


def test_a_budget_for_nothing_still_has_a_tile():
    found = sliced(1, 9)
    assert (found.rows, found.columns) == (1, 1)


def gradients(hidden, weight, targets, coefficients):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    logps = token_logps(*leaves, targets, impl="recompute")
    return torch.autograd.grad(logps, leaves, coefficients.to(logps.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("rows", "unsplit"),
    [(64, 0), (64, 1 << 24), (24, 1 << 24)],
    ids=["one-product", "rounded-in-slices", "summed"],
)
def test_each_way_to_a_slice_is_rounded_once(half_factors, monkeypatch, dtype, rows, unsplit):
    n, v, d = 64, 300, 24
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(v, d) * 0.6).to(dtype)
    targets, coefficients = torch.randint(v, (n,)), torch.rand(n) - 0.5
    want = gradients(hidden.double(), weight.double(), targets, coefficients)
    half_factors(dtype)
    products = []
    inner = torch.mm

    def record(*args, **options):
        products.append(options.get("out") is not None)
        return inner(*args, **options)

    def fixed(*_, **__):
        return Slices(rows, 128, 0, 0.0)

    monkeypatch.setattr(memory, "plan_slices", fixed)
    monkeypatch.setattr(tiles, "UNSPLIT_ENTRIES", unsplit)
    monkeypatch.setattr(tiles, "_SLICE_ROWS", 40)
    monkeypatch.setattr(tiles, "PRODUCT_BYTES", 0)
    monkeypatch.setattr(torch, "mm", record)
    got = gradients(hidden, weight, targets, coefficients)
    for ours, exact in zip(got, want, strict=True):
        error = (ours.double() - exact).norm() / exact.norm()
        assert ours.dtype == dtype and error < 2 * torch.finfo(dtype).eps
    # 128, 128 and 44 columns; fp16 has to undo its scale.
    assert products.count(True) == (3 if unsplit == 0 and dtype == torch.bfloat16 else 0)


def test_no_tokens_give_gradients_of_0():
    hidden, weight = torch.randn(0, 8).bfloat16(), torch.randn(30, 8).bfloat16()
    by_hidden, by_weight = gradients(hidden, weight, torch.zeros(0).long(), torch.zeros(0))
    assert by_hidden.shape == (0, 8) and by_weight.eq(0).all()
