"""The targets' part of gradients, apart from the products that round their factors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastdaa import target_rows, token_logps
from fastdaa.target_rows import TargetRows, add_column_sums, add_target_rows, finish_hidden

N, V, D = 60, 11, 7  # every target several times


def rows_of(n=N, vectors=2):
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(V - 1, (n,), generator=generator)  # the last entry is no target
    return TargetRows(targets, *torch.randn(vectors, n, generator=generator))


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


@pytest.mark.parametrize("part", [4 << 20, 4 * N * 3], ids=["at-once", "in-parts"])
@pytest.mark.parametrize("picked", [False, True], ids=["all", "active"])
def test_what_products_have_of_targets_is_not_added_again(monkeypatch, part, picked):
    monkeypatch.setattr(target_rows, "_PART_BYTES", part)
    rows, active = rows_of(vectors=3), torch.arange(0, N, 3) if picked else None
    rows = rows if active is None else rows.pick(active)
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    some = hidden if active is None else hidden[active]
    factor = (rows.coefficients[:, None] * some).bfloat16().float()
    without = torch.randn(len(some), V).scatter_(1, rows.targets[:, None], 0.0)
    dz = without.scatter(1, rows.targets[:, None], rows.entries[:, None])

    by_hidden = rows.coefficients[:, None] * (without @ weight)
    by_hidden += rows.own[:, None] * weight[rows.targets]
    got = dz @ weight
    finish_hidden(got, rows, weight)
    assert torch.allclose(got, by_hidden, atol=1e-4)

    by_weight = without.T @ factor
    by_weight.index_add_(0, rows.targets, rows.own[:, None] * some)
    got = dz.T @ factor
    add_target_rows(got, hidden, rows, active, factor=factor)
    assert torch.allclose(got, by_weight, atol=1e-4)

    by_bias = (rows.coefficients @ without).index_add(0, rows.targets, rows.own)
    got = torch.zeros(V)
    add_column_sums(got, dz, rows)
    assert torch.allclose(got, by_bias, atol=1e-4)


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


@pytest.mark.parametrize("part", [4 << 20, 4 * D * 7], ids=["at-once", "in-parts"])
@pytest.mark.parametrize("where", ["in-place", "first-rows", "places"])
def test_rows_of_hidden_states_are_finished_where_they_belong(monkeypatch, where, part):
    monkeypatch.setattr(target_rows, "_PART_BYTES", part)
    rows, weight, result = rows_of(), torch.randn(V, D), torch.randn(N, D)
    want = rows.coefficients[:, None] * result + rows.own[:, None] * weight[rows.targets]
    out = None if where == "in-place" else torch.zeros(2 * N, D)
    places = 2 * torch.randperm(N) + 1 if where == "places" else None
    finish_hidden(result, rows, weight, out, places)
    got = result if out is None else out[:N] if places is None else out[places]
    assert torch.allclose(got, want, atol=1e-6)
    assert out is None or out.any(dim=1).sum() == N


def eager(hidden, weight, targets):
    """Materialised logits in fp32, as most trainers have them, and autograd."""
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]


def exact(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]


def wide(hidden, weight, targets):
    """fp32 logits from products of fp32 factors."""
    return exact(hidden.float(), weight.float(), targets)


class Problem:
    """bf16 inputs, one random coefficient a token; half of the targets are likely ones."""

    def __init__(self, n, v, d, peak):
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(n, d, generator=generator).bfloat16()
        self.weight = (torch.randn(v, d, generator=generator) * peak / d**0.5).bfloat16()
        self.targets = torch.randint(v, (n,), generator=generator)
        p = (self.hidden[::2].double() @ self.weight.double().T).softmax(dim=1).float()
        self.targets[::2] = torch.multinomial(p, 1, generator=generator)[:, 0]
        self.coefficients = torch.randn(n, generator=generator)
        self.truth = self.gradients(exact, torch.float64)

    def gradients(self, logps_of, dtype=torch.bfloat16, frozen=False):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (self.hidden, self.weight)]
        wanted = leaves[:1] if frozen else leaves
        leaves[1].requires_grad_(not frozen)
        logps = logps_of(*leaves, self.targets)
        loss = (logps * self.coefficients.to(logps.dtype)).sum()
        return [g.double() for g in torch.autograd.grad(loss, wanted)]

    def errors(self, logps_of, **options):
        """Relative errors of the gradients of hidden states and weight."""
        found = self.gradients(logps_of, **options)
        return [
            float((got - want).norm() / want.norm())
            for got, want in zip(found, self.truth, strict=False)
        ]

    def ours(self, impl, engine="torch"):
        def logps_of(*call):
            return token_logps(*call, impl=impl, engine=engine)

        return self.errors(logps_of, frozen=impl == "frozen")


@pytest.mark.parametrize("impl", ["frozen", "recompute", "single_pass"])
@pytest.mark.parametrize("peak", [0.1, 1.0, 3.0, 40.0])
def test_gradients_are_no_worse_than_those_of_materialised_logits(half_factors, impl, peak):
    problem = Problem(512, 1000, 64, peak)
    theirs = problem.errors(eager)
    half_factors(torch.bfloat16)
    for got, other in zip(problem.ours(impl), theirs, strict=False):
        assert got <= 1.02 * other


TABLE = re.findall(
    r"^\| (0\.1|3|10|40) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$",
    (Path(__file__).parents[1] / "docs" / "head.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize(("peak", "columns"), [(row[0], row[1:]) for row in TABLE])
def test_the_table_of_the_docs(half_factors, peak, columns):
    problem = Problem(2048, 4096, 192, float(peak))
    found = [problem.errors(wide), problem.errors(eager)]
    half_factors(torch.bfloat16)
    found += [problem.ours(impl) for impl in ("frozen", "single_pass", "recompute")]
    shown = [[float(number) for number in column.split(",")] for column in columns]
    for got, numbers in zip(found, shown, strict=True):
        assert got == pytest.approx(numbers, rel=0.06)  # two digits are shown


def test_the_table_is_there():
    assert [row[0] for row in TABLE] == ["0.1", "3", "10", "40"]
