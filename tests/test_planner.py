"""The planner: which path for which call, what it says, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastdaa import HeadPlan, plan_head, planner

V = 128256


def plan(vocab_size=V, device="cpu", *, hidden_grad=True, head_grad=True, **kwargs) -> HeadPlan:
    return plan_head(vocab_size, device, hidden_grad=hidden_grad, head_grad=head_grad, **kwargs)


@pytest.mark.parametrize(
    ("call", "path", "gemms"),
    [
        pytest.param({"hidden_grad": False, "head_grad": False}, "score", 1, id="no-gradient"),
        pytest.param(
            {"hidden_grad": False, "head_grad": False, "loss_inside": True}, "score", 1,
            id="no-gradient-with-loss",
        ),
        pytest.param({"head_grad": False}, "frozen", 2, id="frozen-head"),
        pytest.param({"head_grad": False, "loss_inside": True}, "frozen", 2, id="frozen-with-loss"),
        pytest.param({"loss_inside": True}, "single_pass", 3, id="trained-with-loss"),
        pytest.param(
            {"hidden_grad": False, "loss_inside": True}, "single_pass", 2, id="head-alone"
        ),
        pytest.param({"hidden_grad": False}, "recompute", 3, id="head-alone-loss-outside"),
        pytest.param(
            {"hidden_grad": False, "head_grad": False, "impl": "recompute"}, "recompute", 1,
            id="asked-for-without-gradient",
        ),
        pytest.param({}, "recompute", 4, id="loss-outside"),
        pytest.param({"loss_inside": True, "coupled": True}, "recompute", 4, id="coupled"),
        pytest.param(
            {"head_grad": False, "loss_inside": True, "coupled": True}, "frozen", 2,
            id="coupled-frozen",
        ),
        pytest.param({"head_grad": False, "impl": "recompute"}, "recompute", 3, id="asked-for"),
        pytest.param({"impl": "reference"}, "reference", 3, id="reference"),
        pytest.param({"impl": "recompute", "loss_inside": True}, "recompute", 4, id="not-single"),
    ],
)  # fmt: skip
def test_the_cheapest_path_that_can_serve(call, path, gemms):
    made = plan(**call)
    assert (made.path, made.gemms) == (path, gemms)
    assert (made.reason == "asked for") == ("impl" in call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param({"impl": "score"}, "impl='score' gives no gradient", id="score"),
        pytest.param(
            {"impl": "frozen"}, "expected weight and bias with requires_grad=False", id="frozen"
        ),
        pytest.param(
            {"impl": "single_pass"}, "needs the loss: call fastdaa.pair_loss", id="no-loss"
        ),
        pytest.param(
            {"impl": "single_pass", "loss_inside": True, "coupled": True},
            "cannot serve a loss that couples the pairs", id="coupled",
        ),
        pytest.param({"impl": "fast"}, "impl: expected one of 'auto'.*got 'fast'", id="unknown"),
        pytest.param(
            {"max_bytes": 4 * V - 1}, f"expected at least {4 * V} .*got {4 * V - 1}", id="budget"
        ),
        pytest.param({"max_bytes": 0}, "max_bytes: expected at least", id="no-bytes"),
    ],
)  # fmt: skip
def test_a_path_that_cannot_serve_raises(call, message):
    with pytest.raises(ValueError, match=message):
        plan(**call)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            {"max_bytes": 2e9}, TypeError, "max_bytes: expected an integer, got 2000", id="f"
        ),
        pytest.param({"tokens": -5}, ValueError, "tokens: expected 0 or more, got -5", id="tokens"),
        pytest.param({"vocab_size": 0}, ValueError, "vocab_size: expected 1 or more", id="vocab"),
        pytest.param({"hidden_size": True}, TypeError, "hidden_size: expected an int", id="bool"),
    ],
)
def test_sizes_that_are_none(call, error, message):
    with pytest.raises(error, match=message):
        plan(**call)


KEPT = 8192  # tokens whose gradients are kept, whatever the vocabulary
CHUNK = 6144  # of a chunk that takes no more beside its tile of 512 MiB


@pytest.mark.parametrize(
    ("call", "kept", "path"),
    [
        pytest.param({"tokens": KEPT}, KEPT, "single_pass", id="fits"),
        pytest.param({"tokens": 2 * KEPT}, -CHUNK, "single_pass", id="too-many"),
        pytest.param({}, -CHUNK, "single_pass", id="tokens-unknown"),
        pytest.param({"tokens": 8192, "sharded": True}, -7168, "single_pass", id="sharded"),
        pytest.param({"tokens": 9, "operand": torch.float32}, 0, "single_pass", id="fp32"),
        pytest.param({"tokens": 9, "operand": torch.float16}, 0, "single_pass", id="fp16"),
        pytest.param({"tokens": 9, "loss_inside": False}, 0, "recompute", id="loss-outside"),
        pytest.param({"tokens": 9, "head_grad": False}, 0, "frozen", id="frozen"),
        pytest.param({"tokens": 9, "impl": "recompute"}, 0, "recompute", id="asked-for-another"),
        pytest.param({"tokens": 9, "coupled": True}, 9, "single_pass", id="coupled"),
        pytest.param({"tokens": 8, "max_bytes": 32 * V}, 8, "single_pass", id="within-max-bytes"),
    ],
)  # fmt: skip
def test_bf16_gradients_are_kept_where_they_fit(call, kept, path):
    """``kept`` tokens; a negative number for chunks of a batch that does not fit."""
    made = plan(device="cuda", **{"loss_inside": True, "operand": torch.bfloat16, **call})
    assert (made.kept_tokens, made.kept_whole, made.path) == (abs(kept), kept > 0, path)
    assert made.chunk_tokens == (abs(kept) or made.tile_rows)
    if kept:
        assert made.tile_rows == made.block_rows
        assert made.kept_bytes + made.tile_bytes <= call.get("max_bytes", (2 << 30) + (512 << 20))


@pytest.mark.parametrize(
    "call",
    [
        pytest.param({"tokens": KEPT + 1}, id="a-few-too-many"),
        pytest.param({"tokens": 2 * KEPT, "coupled": True}, id="coupled-too-many"),
        pytest.param({"tokens": 9, "max_bytes": 32 * V}, id="beyond-max-bytes"),
        pytest.param({"tokens": 9, "max_bytes": 32 * V, "impl": "single_pass"}, id="asked-for"),
    ],
)
def test_a_part_of_bf16_gradients_is_kept_where_not_all_fit(call):
    made = plan(device="cuda", **{"loss_inside": True, "operand": torch.bfloat16, **call})
    assert (made.path, made.kept_tokens, made.kept_whole) == ("single_pass", call["tokens"], True)
    assert made.keeps_part and made.kept_columns % 256 == 0
    assert made.gemms == 4 - made.kept_columns / V and 3 < made.gemms < 3.6
    assert made.extra_bytes <= call.get("max_bytes", (2 << 30) + (512 << 20))
    line = f"gradients of {made.kept_columns} of {V} logits of {call['tokens']} tokens kept = "
    assert line in made.explain() and f"({made.gemms:.3g}U" in made.explain()


@pytest.mark.parametrize(
    ("max_mib", "path", "reason"),
    [
        pytest.param(None, "single_pass", "known within a chunk", id="default"),
        pytest.param(8000, "single_pass", "gradients of the batch's logits fit", id="whole"),
        pytest.param(3500, "single_pass", "known within a chunk", id="larger"),
        pytest.param(2600, "single_pass", "a part of the logits fit", id="small-chunks"),
        pytest.param(2300, "single_pass", "a part of the logits fit", id="no-chunks"),
        pytest.param(
            600, "recompute", "2196 MiB of them for sums, more than max_bytes = 600", id="little"
        ),
    ],
)  # fmt: skip
def test_auto_takes_the_cheapest_way_of_a_single_pass_that_fits(max_mib, path, reason):
    made = plan(
        device="cuda", loss_inside=True, tokens=24576, hidden_size=4096, operand=torch.bfloat16,
        max_bytes=max_mib and max_mib << 20,
    )  # fmt: skip
    assert made.path == path and reason in made.reason
    assert max_mib is None or made.extra_bytes <= max_mib << 20
    if not made.kept_whole and path == "single_pass":
        assert made.chunk_tokens >= 1024


def test_more_memory_never_costs_more():
    costs = []
    for max_mib in range(300, 6000, 100):
        made = plan(
            device="cuda", loss_inside=True, tokens=8192, hidden_size=4096, selected=True,
            operand=torch.bfloat16, max_bytes=max_mib << 20,
        )  # fmt: skip
        assert made.extra_bytes <= max_mib << 20
        costs.append(made.gemms)
    assert costs == sorted(costs, reverse=True) and (costs[0], costs[-1]) == (4, 3)
    assert len(set(costs)) > 15


@pytest.mark.parametrize(
    "call",
    [
        pytest.param({}, id="batch"),
        pytest.param({"selected": True}, id="selected"),
        pytest.param({"head_grad": False}, id="hidden"),
        pytest.param({"hidden_grad": False, "tokens": 65536}, id="head"),
        pytest.param({"operand": torch.float16}, id="fp16"),
    ],
)
def test_memory_that_a_single_pass_cannot_keep_is_refused(call):
    """Where both are asked for, neither gives way; and what is named is enough."""
    options = {"tokens": 8192, "hidden_size": 4096, "operand": torch.bfloat16, **call}
    ask = partial(plan, device="cuda", loss_inside=True, impl="single_pass", **options)
    with pytest.raises(ValueError, match="expected at least") as caught:
        ask(max_bytes=64 << 20)
    least = re.search(r"at least (\d+) for impl='single_pass', got", str(caught.value))[1]
    if options["operand"] == torch.bfloat16 and options["tokens"] == 8192:
        assert int(least) < 300 << 20
    made = ask(max_bytes=int(least))
    assert made.path == "single_pass" and made.extra_bytes <= int(least)
    with pytest.raises(ValueError, match="impl='recompute' takes less"):
        ask(max_bytes=int(least) - int(least) // 64)


@pytest.mark.parametrize(("dtype", "path"), [("bfloat16", "recompute"), ("float32", "single_pass")])
def test_chunks_below_the_break_even_are_computed_again(dtype, path):
    """Chunks of some 400 tokens beside sums that fit: for fp32 the products are slower."""
    options = {"loss_inside": True, "tokens": 16384, "hidden_size": 512, "max_bytes": 500 << 20}
    made = plan(device="cuda", operand=getattr(torch, dtype), **options)
    assert made.path == path
    if path == "recompute":
        assert "computing the logits again" in made.reason
    assert plan(device="cuda", impl="single_pass", **options).path == "single_pass"


@pytest.mark.parametrize(
    ("counts", "tokens", "reason"),
    [
        pytest.param((512,) * 32, 16384, "known within a chunk", id="short"),
        pytest.param((2048,) * 8, 16384, "a part of the logits fit", id="long"),
        pytest.param((8192,) * 16, 131072, "compute the logits of longer pairs twice", id="many"),
        pytest.param((2048,) * 2 + (512,) * 120, 65536, "known within a chunk", id="one"),
    ],
)
def test_pairs_that_chunks_would_compute_twice(counts, tokens, reason):
    made = plan(
        device="cuda", loss_inside=True, tokens=tokens, hidden_size=4096, operand=torch.bfloat16,
        counts=counts,
    )  # fmt: skip
    assert reason in made.reason
    if reason != "known within a chunk":
        assert made.kept_whole == (made.path == "single_pass")


def test_what_a_single_pass_that_is_asked_for_computes_twice():
    def asked(counts):
        return plan(
            device="cuda", loss_inside=True, tokens=sum(counts), hidden_size=4096, counts=counts,
            operand=torch.bfloat16, impl="single_pass",
        ).reason  # fmt: skip

    assert asked((512,) * 64) == "asked for"
    long = asked((512,) * 62 + (3000, 2000))
    assert long.endswith("computes the logits of 5000 tokens in longer pairs twice")


@pytest.mark.parametrize("max_mib", [None, 600, 2300, 3500, 8000])
@pytest.mark.parametrize("tokens", [2048, 8192, 16384, 65536])
@pytest.mark.parametrize("longest", [256, 2048, 4096, 65536])
def test_a_backward_pass_that_knows_what_was_kept_plans_as_forward_did(tokens, longest, max_mib):
    """As under a compiler, whose backward pass does not know the lengths of pairs."""
    each = min(longest, tokens) // 2
    ask = partial(
        plan, device="cuda", loss_inside=True, tokens=tokens, hidden_size=4096, selected=True,
        gathered=True, operand=torch.bfloat16, max_bytes=max_mib and max_mib << 20,
    )  # fmt: skip
    forward = ask(counts=(each,) * (tokens // each))
    if forward.kept_whole:
        assert ask(coupled=True) == replace(forward, reason=ask(coupled=True).reason)
    elif forward.path == "recompute":
        assert ask(impl="recompute") == replace(forward, reason="asked for")


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize("softcap", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize("max_mib", [None, 4000, 1000])
def test_all_paths_take_statistics_of_as_many_rows(monkeypatch, engine, softcap, max_mib):
    """A GPU's library may choose another kernel, with other last bits, for other heights."""
    monkeypatch.setattr(planner, "_check_triton", lambda *_: None)
    rows = set()
    for tokens in (8192, 16384):
        for kwargs in (
            {"hidden_grad": False, "head_grad": False},
            {"hidden_grad": False, "head_grad": False, "stats": True},
            {"head_grad": False},
            {"head_grad": False, "stats": True},
            {"impl": "recompute"},
            {"loss_inside": True},
            {"loss_inside": True, "stats": True},
        ):
            made = plan(
                device="cuda", operand=torch.bfloat16, tokens=tokens, hidden_size=4096,
                engine=engine, softcap=softcap, max_bytes=max_mib and max_mib << 20, **kwargs,
            )  # fmt: skip
            rows.add(made.block_rows)
    assert len(rows) == 1 and min(rows) % 256 == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("path", ["score", "frozen", "single_pass", "recompute"])
@pytest.mark.parametrize("vocab_size", [1, 50257, 262144])
@pytest.mark.parametrize("max_bytes", [None, 4 * 262144, 1 << 30], ids=["default", "one-row", "1G"])
def test_tiles_fit_the_budget(device, path, vocab_size, max_bytes):
    if max_bytes == 4 * 262144 and device == "cpu":
        max_bytes *= 16  # the fewest rows of a product there
    made = plan(
        vocab_size, device, hidden_grad=path != "score", max_bytes=max_bytes,
        head_grad=path not in ("score", "frozen"), loss_inside=path == "single_pass",
    )  # fmt: skip
    assert made.path == path
    budget = (1 << 30) if max_bytes is None else max_bytes
    assert 0 < made.tile_bytes <= budget
    assert 0 < 4 * made.block_rows * vocab_size <= budget
    assert 1 <= made.tile_columns <= vocab_size


def test_the_default_budget_serves_a_vocabulary_of_any_size():
    for device, rows in (("cuda", 1), ("cpu", 16)):
        assert plan(300_000_000, device, hidden_grad=False, head_grad=False).block_rows == rows


def test_explain_names_path_cost_tile_and_reason():
    line = plan(50257, loss_inside=True, max_bytes=4 * 50257 * 100).explain()
    assert line == (
        "single_pass (3U, tiles of 96 tokens x 50257 vocabulary entries = 18 MiB, at "
        "most 18 MiB in all): "
        "the head is trained and the loss is known within a chunk of pairs"
    )


def test_explain_names_what_is_kept():
    made = plan(
        device="cuda", loss_inside=True, tokens=8192, operand=torch.bfloat16, engine="triton"
    )
    assert made.explain() == (
        "single_pass (3U, gradients of the logits of 8192 tokens kept = 2004 MiB, tiles of 1024 "
        "tokens x 128256 vocabulary entries = 501 MiB, at most 2505 MiB in all): the head is "
        "trained and the gradients of the batch's logits fit in memory; engine triton: asked for"
    )


def test_explain_claims_no_tiles_where_there_are_none(monkeypatch):
    monkeypatch.setattr(planner, "_check_triton", lambda *_: None)
    line = plan(impl="reference", tokens=9, hidden_size=64).explain()
    assert line == "reference (3U, all logits at once): asked for"
    fused = plan(device="cuda", hidden_grad=False, head_grad=False, engine="fused")
    assert fused.explain().startswith("score (1U, no tiles of logits, at most 0 MiB in all): ")


@pytest.mark.parametrize(
    ("wanted", "units"),
    [((False, False), 2), ((True, False), 3), ((False, True), 5), ((True, True), 6)],
    ids=str,
)
def test_a_divergence_counts_the_logits_of_both_heads(wanted, units):
    made = plan(hidden_grad=wanted[0], head_grad=wanted[1], divergence=True)
    assert made.gemms == units and f"({units}U" in made.explain()


def test_a_batch_that_would_fit_but_for_its_products_is_not_kept_whole():
    """256 tokens over 5003 entries take 3 MiB; a slice of a product and a factor take 36."""
    made = plan(
        5003, "cuda", loss_inside=True, tokens=256, hidden_size=4096, operand=torch.bfloat16,
        max_bytes=21 << 20,
    )  # fmt: skip
    assert made.path == "recompute" and made.extra_bytes <= 21 << 20
