"""CPU blocks: the same bits at any height, for a bounded price on any number of threads."""

from __future__ import annotations

import pytest
import torch
from device_memory import HeldBytes

from fastdaa import LmHead, Objective, TokenSelection, pair_loss, plan_head, token_logps
from fastdaa.plan_call import plan_call

D, V = 64, 1000
COUNTS = (60, 70, 50, 80)  # 260 tokens: a block of 256 and one of 4


@pytest.fixture
def tensors():
    n = sum(COUNTS)
    return torch.randn(n, D), torch.randn(V, D), torch.randint(V, (n,))


@pytest.mark.parametrize("threads", [1, 16, 64])
@pytest.mark.parametrize(
    ("path", "units"), [("score", 1), ("frozen", 2), ("recompute", 4), ("single_pass", 3)]
)
def test_products_cost_what_is_stated_on_any_number_of_threads(tensors, threads, path, units):
    torch.set_num_threads(threads)
    hidden, weight, targets = tensors
    n = hidden.shape[0]
    hidden.requires_grad_(path != "score")
    weight.requires_grad_(path in ("recompute", "single_pass"))
    with HeldBytes() as held:
        if path == "single_pass":
            lengths = torch.tensor(COUNTS)
            selection = TokenSelection(torch.arange(n), targets, lengths, COUNTS)
            loss = pair_loss(
                hidden, LmHead(weight), selection, Objective.parse("dpo"),
                ref_logps=torch.zeros(4), impl=path,
            ).loss  # fmt: skip
        else:
            loss = token_logps(hidden, weight, targets, impl=path).sum()
        if loss.requires_grad:
            loss.backward()
    # The last block is filled up, to 16 rows at most.
    assert units <= held.flop / (2 * n * V * D) <= units + 16 / n


@pytest.mark.parametrize("threads", [1, 16, 64])
@pytest.mark.parametrize("max_rows", [None, 20, 3], ids=["default", "20-rows", "3-rows"])
@pytest.mark.parametrize("path", ["score", "frozen", "recompute"])
def test_memory_is_the_plan_s_on_any_number_of_threads(tensors, threads, path, max_rows):
    torch.set_num_threads(threads)
    # In three rows of logits a frozen head has no room for what it keeps: it recomputes.
    call = {"impl": "auto" if max_rows == 3 else path, "max_bytes": max_rows and 4 * V * max_rows}
    with HeldBytes() as held:
        hidden, weight, targets = (t.clone() for t in tensors)
        hidden.requires_grad_(path != "score")
        weight.requires_grad_(path == "recompute")
        plan = plan_call(hidden, LmHead(weight), **call)
        held.restart()
        token_logps(hidden, weight, targets, **call)
        most = held.peak([hidden, weight, targets])
    assert most <= plan.extra_bytes + 16 * 8 * hidden.shape[0]  # a few numbers a token


@pytest.mark.parametrize("threads", [2, 16])
def test_blocks_of_any_height_give_the_same_bits(tensors, threads):
    torch.set_num_threads(threads)
    hidden, weight, targets = tensors
    expected = token_logps(hidden, weight, targets)
    for rows in (1, 20, 100):
        got = token_logps(hidden, weight, targets, max_bytes=4 * V * rows)
        assert torch.equal(got, expected), rows
    for part in (slice(0, 1), slice(7, 30), slice(259, 260)):
        assert torch.equal(token_logps(hidden[part], weight, targets[part]), expected[part]), part


def test_a_budget_of_few_rows_says_what_it_takes():
    made = plan_head(V, "cpu", hidden_grad=False, head_grad=False, max_bytes=4 * V, tokens=9)
    assert made.block_rows == 16 and made.extra_bytes == 4 * V * 16


@pytest.mark.parametrize("vocab_size", [50304, 128256, 151936])
def test_blocks_fill_their_products(vocab_size):
    made = plan_head(vocab_size, "cpu", hidden_grad=False, head_grad=False, hidden_size=4096)
    assert made.block_rows % 16 == 0
    assert made.tile_bytes == pytest.approx(32 << 20, rel=0.2)
