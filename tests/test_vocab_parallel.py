"""A head whose vocabulary is split over two processes, against the whole one in one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from half_products import take_half_factors
from tile_budget import tiles_of

from fastdaa import LmHead, Objective, TokenSelection, VocabShard, pair_loss
from fastdaa.divergence import token_kl
from fastdaa.logps import head_logps, token_stats
from fastdaa.plan_call import plan_call

N, D, V = 24, 16, 97
CUT = 41  # slices of 41 and 56 rows
LENGTHS = (5, 7, 0, 4, 6, 2)
CASES = {
    "score": {},
    "frozen": {"wanted": (True, False)},
    "recompute": {"wanted": (True, True)},
    "head alone": {"wanted": (False, True)},
    "single pass": {"wanted": (True, True), "loss": "dpo"},
    "single pass, frozen": {"wanted": (True, False), "loss": "ipo"},
    "satisfied pairs": {"wanted": (True, True), "loss": "slic"},
    "coupled": {"wanted": (True, True), "loss": "aot"},
    "softcap": {"wanted": (True, True), "softcap": 4.0, "logit_scale": 0.5},
    "bias": {"wanted": (True, True), "bias": True},
    "bf16": {"wanted": (True, True), "loss": "dpo", "dtype": torch.bfloat16},
    "bf16, frozen": {"wanted": (True, False), "dtype": torch.bfloat16},
    "bf16 factors": {"wanted": (True, True), "loss": "dpo", "dtype": torch.bfloat16, "half": True},
    "triton": {"engine": "triton", "wanted": (True, True), "dtype": torch.float32},
    "triton, score": {"engine": "triton", "dtype": torch.float32},
    "triton, loss": {
        "engine": "triton",
        "wanted": (True, True),
        "loss": "dpo",
        "bias": True,
        "softcap": 4.0,
        "dtype": torch.float32,
    },
    "small budget": {"wanted": (True, True), "loss": "dpo", "tile_rows": 3},
    # Less than the wide gradient of the hidden states takes.
    "frozen, few bytes": {"wanted": (True, False), "max_bytes": 1500},
    "few bytes": {"wanted": (True, True), "dtype": torch.bfloat16, "max_bytes": 1500},
}
# Where Triton's interpreter is off, beside a GPU, its kernels do not take CPU tensors.
NAMES = [
    pytest.param(name, marks=[pytest.mark.interpreter] if "engine" in case else [])
    for name, case in CASES.items()
]
COMPILED = ("recompute", "single pass", "coupled")


def run(case, *args, **options):
    """Values and gradients of a case, with the whole head or with the slice of a process."""
    with pytest.MonkeyPatch.context() as patch:
        if case.get("half"):
            take_half_factors(patch, case["dtype"])
        return outcome_of(case, *args, **options)


def outcome_of(case, rank=None, group=None, compiled=False):
    generator = torch.Generator().manual_seed(3)
    dtype, engine = case.get("dtype", torch.float64), case.get("engine", "auto")

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias, ref = randn(N, D), randn(V, D), randn(V), -50 + randn(6)
    targets = torch.randint(0, V, (N,), generator=generator)
    ids = slice(0, V) if rank is None else (slice(0, CUT), slice(CUT, V))[rank]
    shard = None if rank is None else VocabShard(ids.start, V, group, widest=V - CUT)
    want_hidden, want_head = case.get("wanted", (False, False))
    hidden.requires_grad_(want_hidden)
    weight = weight[ids].clone().requires_grad_(want_head)
    bias = bias[ids].clone().requires_grad_(want_head) if case.get("bias") else None

    def head():
        return LmHead(weight, bias, case.get("softcap"), case.get("logit_scale", 1.0), shard=shard)

    def call():
        if "loss" not in case:
            logps = head_logps(
                hidden, head(), targets, engine=engine, max_bytes=case.get("max_bytes")
            )
            return [logps], logps.sin().sum()
        selection = TokenSelection(torch.arange(N), targets, torch.tensor(LENGTHS), LENGTHS)
        out = pair_loss(
            hidden, head(), selection, Objective.parse(case["loss"]), ref_logps=ref.float(),
            engine=engine,
        )  # fmt: skip
        return [out.loss, out.losses, out.token_logps], out.loss

    if compiled:
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    with tiles_of(case.get("tile_rows"), V - CUT):
        result, total = call()
    if "loss" not in case and not compiled:
        result += token_stats(hidden, head(), targets, engine=engine)[1]
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    grads = torch.autograd.grad(total, leaves) if leaves else ()
    return [t.detach() for t in result], list(grads)


def worker(port, folder, rank):
    rank, cases = int(rank), CASES
    if os.environ.get("TRITON_INTERPRET") == "1":
        from fastdaa.kernels import configs

        # Slices of 41 and 56 columns have other numbers of splits.
        configs.ROW_CONFIGS["row_statistics"][80] = configs.RowConfig(16, 4, split_v=16)
    else:
        cases = {name: case for name, case in cases.items() if "engine" not in case}
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=180))
    outcome = {name: (run(case, rank), run(case, rank)) for name, case in cases.items()}
    for name, group in zip(COMPILED, (None, dist.new_group([0, 1]), None), strict=True):
        outcome[name] += (run(CASES[name], rank, group, compiled=True),)
    torch.save(outcome, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, __file__, str(port), str(folder)]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def joined(case, parts):
    """Gradients of both processes put together: whole for hidden states, slices for the head."""
    own = [part[1] for part in parts]
    first = 0
    grads = []
    if case.get("wanted", (False, False))[0]:
        assert torch.equal(own[0][0], own[1][0])
        grads, first = [own[0][0]], 1
    return grads + [torch.cat([a, b]) for a, b in zip(own[0][first:], own[1][first:], strict=True)]


@pytest.mark.parametrize("rows", [None, 2, 20], ids=["default", "few-rows", "blocks"])
@pytest.mark.parametrize("path", ["score", "frozen", "recompute", "single_pass"])
def test_processes_with_uneven_slices_cut_the_same_tiles(path, rows):
    """They reduce tile by tile: another number of tiles would be a process that waits forever."""
    hidden = torch.randn(N, D, dtype=torch.float64)
    plans = set()
    for ids in (slice(0, CUT), slice(CUT, V)):
        shard = VocabShard(ids.start, V, widest=V - CUT)
        head = LmHead(torch.randn(ids.stop - ids.start, D, dtype=torch.float64), shard=shard)
        with tiles_of(rows, V - CUT):
            plans.add(
                plan_call(
                    hidden, head, loss_inside=path == "single_pass", impl=path,
                    wanted=(path != "score", path in ("recompute", "single_pass")),
                )
            )  # fmt: skip
    assert len(plans) == 1


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_compute_what_one_does(outcomes, name):
    case = CASES[name]
    values, grads = run(case)
    half, wide = (case.get("dtype") == dtype for dtype in (torch.bfloat16, None))
    both = [outcome[name][0] for outcome in outcomes]
    for rank in both:
        for got, want in zip(rank[0], values, strict=True):
            assert torch.allclose(got, want, atol=1e-12 if wide else 1e-5, rtol=1e-5)
    for got, want in zip(joined(case, both), grads, strict=True):
        assert got.dtype == want.dtype
        limit = 1e-2 if half else 1e-12 if wide else 1e-5
        assert (got - want).abs().max() <= limit * want.abs().max() + 1e-30


@pytest.mark.parametrize("name", NAMES)
def test_processes_agree_to_the_bit_and_repeat(outcomes, name):
    (a, again), (b, _) = (outcome[name][:2] for outcome in outcomes)
    for x, y, z in zip(a[0], b[0], again[0], strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)
    for x, z in zip(a[1], again[1], strict=True):
        assert torch.equal(x, z)


@pytest.mark.parametrize("name", COMPILED)
def test_one_node_of_a_compiled_graph_has_the_same_bits(outcomes, name):
    for outcome in outcomes:
        (values, grads), _, (compiled_values, compiled_grads) = outcome[name]
        # Token statistics are not compiled.
        for x, y in zip(values, compiled_values, strict=False):
            assert torch.equal(x, y)
        for x, y in zip(grads, compiled_grads, strict=True):
            assert torch.equal(x, y)


def test_a_slice_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"shard: expected 5 rows from token 7 to lie .* 10"):
        LmHead(torch.zeros(5, 3), shard=VocabShard(7, 10))


def test_a_slice_that_nobody_plans_for_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    hidden, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    head = LmHead(torch.zeros(6, 3), shard=VocabShard(3, 9))
    with pytest.raises(ValueError, match=r"expected at most 5 rows, as an even split of 9 .* got"):
        head_logps(hidden, head, targets)
    with pytest.raises(ValueError, match=r"shard: expected at most widest=5 rows, got 6"):
        LmHead(torch.zeros(6, 3), shard=VocabShard(3, 9, widest=5))
    assert LmHead(torch.zeros(3, 3), shard=VocabShard(0, 9, widest=6)).planned_width == 6
    # The other process must not go on, and wait for the first one.
    narrow = LmHead(torch.zeros(3, 3), shard=VocabShard(0, 9))
    with pytest.raises(ValueError, match=r"expected at least 4 rows, as an even split of 9"):
        head_logps(hidden, narrow, targets)
    assert LmHead(torch.zeros(4, 3), shard=VocabShard(5, 9)).planned_width == 5


@pytest.mark.interpreter
def test_what_needs_the_whole_vocabulary_says_so(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    head = LmHead(torch.zeros(5, 3), shard=VocabShard(0, 10))
    whole = LmHead(torch.zeros(5, 3))
    hidden, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda: token_kl(hidden, head, hidden, whole),
        lambda: head_logps(hidden, head, targets, impl="reference"),
        lambda: head_logps(hidden, head, targets, engine="fused"),
    ):
        with pytest.raises(
            ValueError, match=r"expected .*(the whole vocabulary|all of V), got a slice"
        ):
            call()


@pytest.mark.interpreter
def test_an_even_split_needs_no_widest_slice_with_kernels_either(monkeypatch):
    """A group of one process: its slice is an even split of all."""
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    gather = lambda everyone, states, group: everyone[0].copy_(states)  # noqa: E731
    monkeypatch.setattr(dist, "all_gather", gather)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, D, generator=generator) for n in (N, V))
    targets = torch.randint(0, V, (N,), generator=generator)
    alone = head_logps(hidden, LmHead(weight), targets, engine="triton")
    shared = LmHead(weight, shard=VocabShard(0, V))
    assert torch.equal(head_logps(hidden, shared, targets, engine="triton"), alone)


if __name__ == "__main__":
    worker(*sys.argv[1:])
