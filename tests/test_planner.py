"""The planner: which path for which call, what it says, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fastdaa import HeadPlan, plan_head

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
            {"hidden_grad": False, "loss_inside": True}, "single_pass", 3, id="head-alone"
        ),
        pytest.param({}, "recompute", 4, id="loss-outside"),
        pytest.param({"loss_inside": True, "coupled": True}, "recompute", 4, id="coupled"),
        pytest.param(
            {"head_grad": False, "loss_inside": True, "coupled": True}, "frozen", 2,
            id="coupled-frozen",
        ),
        pytest.param({"head_grad": False, "impl": "recompute"}, "recompute", 4, id="asked-for"),
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


KEPT = (2 << 30) // (2 * V)  # tokens whose half-precision gradients take 2 GiB


@pytest.mark.parametrize(
    ("call", "kept", "path"),
    [
        pytest.param({"tokens": KEPT}, KEPT, "single_pass", id="fits"),
        pytest.param({"tokens": KEPT + 1}, 0, "single_pass", id="too-many"),
        pytest.param({}, 0, "single_pass", id="tokens-unknown"),
        pytest.param({"tokens": 0}, 0, "single_pass", id="no-tokens"),
        pytest.param({"tokens": 9, "operand": torch.float32}, 0, "single_pass", id="fp32"),
        pytest.param({"tokens": 9, "operand": None}, 0, "single_pass", id="dtype-unknown"),
        pytest.param({"tokens": 9, "operand": torch.float16}, 0, "single_pass", id="fp16"),
        pytest.param({"tokens": 9, "loss_inside": False}, 0, "recompute", id="loss-outside"),
        pytest.param({"tokens": 9, "head_grad": False}, 0, "frozen", id="frozen"),
        pytest.param({"tokens": 9, "impl": "recompute"}, 0, "recompute", id="asked-for-another"),
        pytest.param({"tokens": 9, "coupled": True}, 9, "single_pass", id="coupled"),
        pytest.param({"tokens": KEPT + 1, "coupled": True}, 0, "recompute", id="coupled-too-many"),
        pytest.param({"tokens": 8, "max_bytes": 32 * V}, 8, "single_pass", id="within-half"),
        pytest.param({"tokens": 9, "max_bytes": 32 * V}, 0, "single_pass", id="beyond-half"),
    ],
)  # fmt: skip
def test_bf16_gradients_are_kept_where_they_fit(call, kept, path):
    made = plan(device="cuda", **{"loss_inside": True, "operand": torch.bfloat16, **call})
    assert (made.kept_tokens, made.path) == (kept, path)
    assert made.chunk_tokens == (kept or made.tile_rows)
    if kept:
        assert made.tile_rows == made.block_rows
        assert made.kept_bytes + made.tile_bytes <= call.get("max_bytes", (2 << 30) + (512 << 20))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("path", ["score", "frozen", "single_pass", "recompute"])
@pytest.mark.parametrize("vocab_size", [1, 50257, 262144])
@pytest.mark.parametrize("max_bytes", [None, 4 * 262144, 1 << 30], ids=["default", "one-row", "1G"])
def test_tiles_fit_the_budget(device, path, vocab_size, max_bytes):
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
    assert plan(300_000_000, hidden_grad=False, head_grad=False).block_rows == 1


def test_explain_names_path_cost_tile_and_reason():
    line = plan(50257, loss_inside=True, max_bytes=4 * 50257 * 100).explain()
    assert line == (
        "single_pass (3U, tiles of 100 tokens x 50257 vocabulary entries = 19 MiB): "
        "the head is trained and the loss is known within a chunk of pairs"
    )


def test_explain_names_what_is_kept():
    made = plan(
        device="cuda", loss_inside=True, tokens=8192, operand=torch.bfloat16, engine="triton"
    )
    assert made.explain() == (
        "single_pass (3U, gradients of the logits of 8192 tokens kept = 2004 MiB, tiles of 1046 "
        "tokens x 128256 vocabulary entries = 512 MiB): the head is trained and the gradients of "
        "the batch's logits fit in memory; engine triton: asked for"
    )
