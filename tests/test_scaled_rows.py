"""Hidden states times coefficients, rounded so that equal entries do not all lose the same."""

from __future__ import annotations

import pytest
import torch

from fastdaa import scaled_rows as scaled_rows_module
from fastdaa.scaled_rows import scaled_rows

N, D = 37, 19
ULP = 2.0**-7
"""Of bf16, relative to the power of two below a number."""


def problem(dtype=torch.bfloat16, n=N):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n + 5, D, generator=generator).to(dtype)
    active = torch.randperm(n + 5, generator=generator)[:n]
    return hidden, torch.randn(n, generator=generator), active


def power_below(x):
    """The power of two at or below the size of numbers."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_each_entry_is_one_of_the_two_beside_it(dtype, some):
    hidden, coefficients, active = problem(dtype)
    hidden, rows = (hidden, active) if some else (hidden[:N], None)
    got = scaled_rows(hidden, coefficients, torch.bfloat16, rows)
    exact = coefficients[:, None] * (hidden if rows is None else hidden[rows]).float()
    assert got.shape == (N, D) and got.dtype == torch.bfloat16
    assert ((got.float() - exact).abs() < ULP * power_below(exact)).all()


def test_entries_that_bf16_has_stay():
    hidden = problem()[0][:N]
    for power in (1.0, -0.25):
        got = scaled_rows(hidden, torch.full((N,), power), torch.bfloat16)
        assert torch.equal(got, power * hidden)


@pytest.mark.parametrize("entry", [1.003, -1.4567, 3e-5, 300.7])
@pytest.mark.parametrize("step", [1, 2, 3, 8, 64])
def test_what_equal_entries_lose_cancels(entry, step):
    """Of all rows, and of every few of them."""
    n = 4096
    got = scaled_rows(torch.full((n, 1), entry), torch.ones(n), torch.bfloat16)[::step].double()
    ulp = ULP * power_below(torch.tensor(entry).abs()).item()
    # To the nearest, the sum is off by up to half an ulp for every row.
    assert abs(got.sum().item() - got.shape[0] * torch.tensor(entry).item()) < 4 * ulp
    assert got.unique().shape[0] == 2


def test_a_row_alone_is_rounded_to_the_nearest():
    hidden = problem(torch.float32)[0][:1]
    got = scaled_rows(hidden, torch.tensor([0.37]), torch.bfloat16)
    assert torch.equal(got, (0.37 * hidden).bfloat16())


def test_what_is_not_finite_stays_so():
    hidden = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, -0.0]]).repeat(8, 1)
    got = scaled_rows(hidden, torch.ones(8), torch.bfloat16)
    assert torch.equal(got.isnan(), hidden.isnan()) and torch.equal(got.isinf(), hidden.isinf())
    assert torch.equal(got[:, 3:], torch.zeros(8, 2))
    # A GPU's NaN, whose bits wrap around.
    nan = torch.full((8, 1), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert scaled_rows(nan, torch.ones(8), torch.bfloat16).isnan().all()


def test_parts_do_not_matter(monkeypatch):
    hidden, coefficients, active = problem()
    whole = scaled_rows(hidden, coefficients, torch.bfloat16, active)
    monkeypatch.setattr(scaled_rows_module, "_PART_BYTES", 4 * D * 5)
    assert torch.equal(scaled_rows(hidden, coefficients, torch.bfloat16, active), whole)


@pytest.mark.parametrize("operand", [torch.float32, torch.float16, torch.float64], ids=str)
def test_other_dtypes_round_to_the_nearest(operand):
    hidden, coefficients, active = problem(operand)
    wide = coefficients.to(torch.promote_types(operand, torch.float32))
    got = scaled_rows(hidden, wide, operand, active)
    assert torch.equal(got, (wide[:, None] * hidden[active]).to(operand))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["all", "some", "transposed", "none"])
@pytest.mark.interpreter
def test_the_kernel_has_the_same_bits(dtype, layout):
    hidden, coefficients, active = problem(dtype)
    if layout == "transposed":
        hidden = hidden.T.contiguous().T
    if layout == "none":
        hidden, coefficients, active = hidden[:0], coefficients[:0], active[:0]
    coefficients[:2] = torch.tensor([0.0, torch.nan])[: len(coefficients)]
    rows = active if layout == "some" else None
    call = (hidden if rows is not None else hidden[:N], coefficients, torch.bfloat16, rows)
    got, want = scaled_rows(*call, engine="triton"), scaled_rows(*call)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
