"""The targets' part of gradients: kernels on a GPU, or in the interpreter without one."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from fastdaa.kernels.configs import ROW_CONFIGS  # noqa: E402
from fastdaa.kernels.hidden_rows import finish_hidden_rows, scale_hidden_rows  # noqa: E402
from fastdaa.kernels.target_rows import add_sorted_rows  # noqa: E402
from fastdaa.target_rows import TargetRows, add_target_rows, finish_hidden  # noqa: E402
from fastdaa.waiting_rows import WaitingRows  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 13
SMALL = ROW_CONFIGS["target_rows"][90]._replace(block_v=16, block_n=4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def problem(n, d, dtype, targets):
    generator = torch.Generator().manual_seed(n + d)
    out, hidden = (torch.randn(rows, d, generator=generator) for rows in (V, n + 3))
    factors = torch.randn(n, generator=generator)
    order = torch.randperm(n + 3, generator=generator)[:n]
    made = out.to(dtype), hidden.to(dtype), targets[:n].sort().values, order, factors
    return [t.to(DEVICE) for t in made]


def exact(out, hidden, targets, sources, factors):
    want = out.double()
    inside = (targets >= 0) & (targets < V)
    rows = factors.double()[:, None] * hidden.double()[sources]
    return want.index_add(0, targets[inside], rows[inside])


TARGETS = {
    # Groups of 1, of all lengths around the rows that are read at a time, and one of all.
    "distinct": torch.randperm(V, generator=torch.Generator().manual_seed(1)),
    "groups": torch.tensor([0] + 3 * [1] + 4 * [4] + 5 * [7] + 8 * [8] + 9 * [12]),
    "one": torch.full((70,), 5),
    "outside": torch.tensor([-7, -1, -1, 0, 0, 3, V, V, V, V, V, 2**40]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 16, 45])
@pytest.mark.parametrize("name", TARGETS)
def test_rows_of_a_target_are_added_and_rounded_once(name, d, dtype):
    targets = TARGETS[name]
    out, *rows = made = problem(len(targets), d, DTYPES[dtype], targets)
    want, repeated = exact(*made), out.clone()
    add_sorted_rows(out, *rows, config=SMALL)
    add_sorted_rows(repeated, *rows, config=SMALL)
    assert torch.equal(out, repeated)
    # The interpreter truncates bf16 where a GPU rounds.
    unit = {"fp32": 2e-7, "bf16": 2.0**-7, "fp16": 2.0**-11}[dtype]
    assert ((out.double() - want).abs() <= unit * want.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TARGETS)
def test_other_rows_are_subtracted_before_anything_is_rounded(name, dtype):
    """Most of both cancels, as what is rounded does with what it was rounded from."""
    targets = TARGETS[name]
    out, hidden, targets, sources, factors = problem(len(targets), 45, DTYPES[dtype], targets)
    n = len(targets)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    less, entries = torch.empty_like(hidden[:n]).T.contiguous().T, 1.01 * factors
    less[order] = hidden[sources]
    want = exact(exact(out, hidden, targets, sources, factors), less, targets, order, -entries)
    add_sorted_rows(out, hidden, targets, sources, factors, (less, order, entries), config=SMALL)
    unit = {"fp32": 2e-7, "bf16": 2.0**-7, "fp16": 2.0**-11}[dtype]
    assert ((out.double() - want).abs() <= unit * want.abs() + 2e-5).all()


def test_what_is_written_counts_as_changed():
    """Autograd and checkpoints go by the version of a tensor, which a kernel does not move."""
    out, hidden, *rows = problem(4, 20, torch.bfloat16, TARGETS["one"])
    product, numbers = torch.zeros(4, 20, device=DEVICE), rows[2]
    writes = {
        "weight": (out, lambda: add_sorted_rows(out, hidden, *rows)),
        "hidden": (product, lambda: finish_hidden_rows(
            product, numbers, numbers, hidden, rows[0], product)),
        "factor": (hidden, lambda: scale_hidden_rows(out, numbers, hidden[:4])),
    }  # fmt: skip
    for name, (tensor, write) in writes.items():
        before = tensor._version
        write()
        assert tensor._version > before, name


def test_only_rows_of_targets_are_written():
    out, hidden, targets, sources, factors = problem(4, 20, torch.float32, TARGETS["one"])
    memory = torch.full((V, 64), float("nan"), device=DEVICE)
    view = memory[:, 8:28]  # rows lie apart, and begin between two others
    view[5] = out[5]
    add_sorted_rows(view, hidden, targets, sources, factors, config=SMALL)
    want = exact(out, hidden, targets, sources, factors)[5]
    assert torch.allclose(memory[5, 8:28].double(), want, atol=1e-5)
    memory[5, 8:28] = float("nan")
    assert memory.isnan().all()


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    out, *rows = made = problem(n, 5, torch.float32, TARGETS["one"])
    want = exact(*made)
    add_sorted_rows(out, *rows)
    assert torch.allclose(out.double(), want, atol=1e-6)


def test_nothing_is_read_before_the_first_row_or_of_rows_that_are_not_asked_for():
    out, hidden, targets, _, factors = problem(9, 20, torch.float32, TARGETS["groups"])
    # In memory, another row of the same target comes before the first one.
    targets = torch.cat([targets[:1], targets])[1:]
    factors = torch.cat([factors, factors.new_full((1,), float("inf"))])[:-1]
    sources = torch.arange(9, device=DEVICE) + 1
    hidden[0] = hidden[10:] = float("nan")
    want = exact(out, hidden, targets, sources, factors)
    add_sorted_rows(out, hidden, targets, sources, factors, config=SMALL)
    assert torch.allclose(out.double(), want, atol=1e-5)


def test_rows_may_have_any_strides():
    """As the gradient of a transposed weight, and vectors that are columns of a table."""
    out, hidden, *vectors = made = problem(9, 37, torch.float32, TARGETS["groups"])
    want = exact(*made)
    out, hidden = out.T.contiguous().T, hidden.repeat_interleave(2, dim=1)[:, ::2]
    vectors = [torch.stack([t, torch.zeros_like(t)], dim=1)[:, 0] for t in vectors]
    add_sorted_rows(out, hidden, *vectors, config=SMALL)
    assert torch.allclose(out.double(), want, atol=1e-5)


@pytest.mark.parametrize("less", [False, True], ids=["all-of-it", "what-is-lacking"])
@pytest.mark.parametrize("picked", [False, True], ids=["all", "active"])
def test_both_engines_add_the_same(picked, less):
    generator = torch.Generator().manual_seed(4)
    n, d = 60, 33
    targets = torch.randint(V, (n,), generator=generator)
    rows = TargetRows(targets, *torch.randn(3 if less else 2, n, generator=generator))
    active = torch.arange(0, n, 3) if picked else None
    rows = rows if active is None else rows.pick(active)
    factor = torch.randn(len(rows.targets), d, generator=generator).to(DEVICE) if less else None
    hidden, start = (torch.randn(d, m, generator=generator).T for m in (n, V))
    outs = []
    for engine in ("torch", "triton"):
        out = start.contiguous().to(DEVICE)
        some = None if active is None else active.to(DEVICE)
        of = TargetRows(*(t.to(DEVICE) for t in rows if t is not None))
        add_target_rows(out, hidden.to(DEVICE), of, some, engine, factor)
        outs.append(out)
    assert torch.allclose(*outs, atol=1e-5)


# The gradient of the hidden states


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [False, True], ids=["in-order", "placed"])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (7, 45), (12, 32)])
def test_hidden_rows_are_finished_and_rounded_once(n, d, places, dtype):
    generator = torch.Generator().manual_seed(n * d)
    product, weight = (torch.randn(m, d, generator=generator).to(DEVICE) for m in (n, V))
    factors, own = torch.randn(2, n, generator=generator).to(DEVICE)
    targets = torch.randint(-3, V + 3, (n,), generator=generator).to(DEVICE)
    weight, before = weight.to(DTYPES[dtype]), torch.randn(2 * n, d).to(DEVICE, DTYPES[dtype])
    inside = (targets >= 0) & (targets < V)
    want = factors.double()[:, None] * product.double()
    want += (own * inside).double()[:, None] * weight.double()[targets.clamp(0, V - 1)]
    rows = torch.randperm(2 * n, generator=generator)[:n].to(DEVICE) if places else None
    out = before.clone()
    config = ROW_CONFIGS["hidden_rows"][90]._replace(block_v=16)
    call = (product, factors, own, weight, targets, out)
    finish_hidden_rows(*call, rows, config=config)
    rows = torch.arange(n, device=DEVICE) if rows is None else rows
    unit = {"fp32": 2e-7, "bf16": 2.0**-7, "fp16": 2.0**-11}[dtype]
    assert ((out[rows].double() - want).abs() <= unit * want.abs() + 1e-6).all()
    others = torch.ones(2 * n, dtype=torch.bool, device=DEVICE).index_fill_(0, rows, False)
    assert torch.equal(out[others], before[others])


def test_hidden_rows_are_finished_in_place():
    generator = torch.Generator().manual_seed(0)
    product, weight = (torch.randn(m, 33, generator=generator).to(DEVICE) for m in (9, V))
    factors, own = torch.randn(2, 9, generator=generator).to(DEVICE)
    targets = torch.randint(V, (9,), generator=generator).to(DEVICE)
    rows = TargetRows(targets, factors, own)
    ours, theirs = product.clone(), product.clone()
    finish_hidden(ours, rows, weight, engine="triton")
    finish_hidden(theirs, rows, weight)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_rows_that_wait_in_fp16_are_finished_in_their_own_memory():
    generator = torch.Generator().manual_seed(5)
    n, d = 9, 3000
    sums, weight = (torch.randn(m, d, generator=generator).to(DEVICE) for m in (n, V))
    waiting = WaitingRows.empty(sums, torch.float32, packed=True)
    waiting.put(slice(0, n), sums * torch.logspace(-20, 20, n, device=DEVICE)[:, None])
    own = torch.randn(n, generator=generator).to(DEVICE)
    targets = torch.randint(V, (n,), generator=generator).to(DEVICE)
    want = waiting.load(slice(0, n)) + own[:, None] * weight[targets]
    out = waiting.entries.view(torch.bfloat16)
    finish_hidden_rows(waiting.entries, waiting.scales, own, weight, targets, out)
    assert out.data_ptr() == waiting.entries.data_ptr()
    assert ((out.float() - want).abs() <= 2.0**-7 * want.abs()).all()


def test_hidden_rows_may_have_any_strides():
    generator = torch.Generator().manual_seed(3)
    n, d = 9, 33
    product, weight, out = (
        torch.randn(d, m, generator=generator).to(DEVICE).T for m in (n, V, 2 * n)
    )
    factors, own = torch.randn(n, 2, generator=generator).to(DEVICE).T
    table = torch.stack([torch.randint(V, (n,), generator=generator), torch.arange(n) * 2], dim=1)
    targets, places = table.to(DEVICE).T
    want = factors[:, None] * product + own[:, None] * weight[targets]
    config = ROW_CONFIGS["hidden_rows"][90]._replace(block_v=16)
    finish_hidden_rows(product, factors, own, weight, targets, out, places, config=config)
    assert torch.allclose(out[places], want, atol=1e-5)
