"""The targets' part of gradients, apart from the products that round their factors."""

from __future__ import annotations

import pytest
import torch

from fastdaa import target_rows, token_logps
from fastdaa.target_rows import TargetRows, add_column_sums, add_target_rows

N, V, D = 60, 11, 7  # every target several times


def rows_of(n=N):
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(V - 1, (n,), generator=generator)  # the last entry is no target
    return TargetRows(targets, *torch.randn(2, n, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("part", [4 << 20, 4 * N * 3], ids=["at-once", "in-parts"])
@pytest.mark.parametrize("picked", [False, True], ids=["all", "active"])
def test_rows_of_one_target_are_summed_before_they_are_rounded(monkeypatch, dtype, part, picked):
    monkeypatch.setattr(target_rows, "_PART_BYTES", part)
    rows, active = rows_of(), None
    hidden = torch.randn(N, D).to(dtype)
    out = torch.randn(V, D).to(dtype)
    if picked:
        active = torch.arange(0, N, 3)
        rows = rows.pick(active)
    want = out.double()
    some = hidden if active is None else hidden[active]
    for target, own, row in zip(rows.targets, rows.own, some, strict=True):
        want[target] += own.double() * row.double()
    last = out[-1].clone()
    add_target_rows(out, hidden, rows, active)
    assert torch.equal(out[-1], last)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert ((out.double() - want).abs() <= unit * want.abs() + 1e-5).all()


def test_no_row_changes_nothing():
    out = torch.randn(V, D)
    before = out.clone()
    add_target_rows(out, torch.randn(0, D), rows_of(0))
    assert torch.equal(out, before)


@pytest.mark.parametrize("columns", [4 << 20, 2])
def test_column_sums_and_the_entries_of_targets(monkeypatch, columns):
    monkeypatch.setattr(target_rows, "PRODUCT_BYTES", 4 * N * columns)
    rows, dz = rows_of(), torch.randn(N, V).bfloat16()
    out = torch.randn(V)
    want = out.double() + rows.coefficients.double() @ dz.double()
    want.index_add_(0, rows.targets, rows.own.double())
    add_column_sums(out, dz, rows)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def eager(hidden, weight, targets):
    """Materialised logits in fp32, as most trainers have them, and autograd."""
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("impl", ["frozen", "recompute", "single_pass"])
@pytest.mark.parametrize("peak", [0.1, 1.0, 3.0, 40.0])
def test_gradients_are_no_worse_than_those_of_materialised_logits(half_factors, impl, peak):
    """bf16 as on a GPU, one random coefficient a token; half of the targets are likely ones."""
    n, v, d = 512, 1000, 64
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(n, d, generator=generator).bfloat16()
    weight = (torch.randn(v, d, generator=generator) * peak / d**0.5).bfloat16()
    targets = torch.randint(v, (n,), generator=generator)
    p = (hidden[::2].double() @ weight.double().T).softmax(dim=1)
    targets[::2] = torch.multinomial(p, 1, generator=generator)[:, 0]
    coefficients = torch.randn(n, generator=generator)

    def gradients(logps_of, dtype):
        leaves = hidden.to(dtype).clone().requires_grad_(), weight.to(dtype).clone()
        leaves[1].requires_grad_(impl != "frozen")
        logps = logps_of(*leaves, targets)
        wanted = [t for t in leaves if t.requires_grad]
        loss = (logps * coefficients.to(logps.dtype)).sum()
        return [g.double() for g in torch.autograd.grad(loss, wanted)]

    def exact(hidden, weight, targets):
        return (hidden @ weight.T).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]

    truth, theirs = gradients(exact, torch.float64), gradients(eager, torch.bfloat16)
    half_factors(torch.bfloat16)
    ours = gradients(lambda *call: token_logps(*call, impl=impl, engine="torch"), torch.bfloat16)
    for got, other, want in zip(ours, theirs, truth, strict=True):
        assert (got - want).norm() <= 1.02 * (other - want).norm()
