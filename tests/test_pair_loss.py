"""``pair_loss``: all paths give the loss and the gradients of plain torch, in any chunks."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from tile_budget import tiles_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdaa import (
    BatchTotals,
    LmHead,
    Objective,
    PairLogps,
    TokenSelection,
    pair_loss,
    reference,
    tiles,
    token_logps,
    token_stats,
)
from fastdaa.chunks import chunks_of_pairs
from fastdaa.logps import head_logps, sequence_logps

COUNTS = (6, 9, 1, 4, 12, 3, 7, 7)
PATHS = ("single_pass", "recompute", "frozen", "score")
V, D, L = 131, 24, 60


class Batch(NamedTuple):
    """Hidden states ``[2, L / 2, D]``, a head, and what the objectives need beside them."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None
    selection: TokenSelection
    ref_token_logps: Tensor
    options: dict[str, float]

    def copies(self, dtype: torch.dtype | None = None, path: str = "single_pass") -> Batch:
        trained = {"score": 0, "frozen": 1}.get(path, 3)
        leaves = (
            None
            if t is None
            else t.detach().to(dtype or t.dtype, copy=True).requires_grad_(i < trained)
            for i, t in enumerate(self[:3])
        )
        return Batch(*leaves, self.selection, self.ref_token_logps, self.options)

    @property
    def head(self) -> LmHead:
        return LmHead(self.weight, self.bias, **self.options)

    @property
    def ref_logps(self) -> Tensor:
        return reference.sequence_logps(self.ref_token_logps, self.selection.counts)

    def grads(self) -> dict[str, Tensor]:
        leaves = zip(("hidden_states", "weight", "bias"), self[:3], strict=True)
        return {k: t.grad for k, t in leaves if t is not None and t.requires_grad}

    def run(self, objective, tile_rows=None, **kwargs):
        with tiles_of(tile_rows, len(self.weight)):
            out = pair_loss(
                self.hidden_states, self.head, self.selection, objective,
                **{"ref_token_logps": self.ref_token_logps, **kwargs},
            )  # fmt: skip
        if out.loss.requires_grad:
            out.loss.backward()
        return out, self.grads()

    def oracle(self, objective):
        """Losses of materialised logits; loops over sequences, no shared code but the losses."""
        rows = self.hidden_states.reshape(-1, D)[self.selection.rows]
        logps = reference.token_logps(
            rows, self.weight, self.selection.targets, bias=self.bias, **self.options
        )
        sums = reference.sequence_logps(logps, self.selection.counts)
        lengths = self.selection.lengths
        ref_tokens = self.ref_token_logps.to(logps.dtype)
        ref_sums = reference.sequence_logps(ref_tokens, self.selection.counts)
        sides = [PairLogps(x[::2], x[1::2], lengths[::2], lengths[1::2]) for x in (sums, ref_sums)]
        tokens = None
        if objective.has_token_level:
            tokens = objective.token_losses(logps, ref_tokens, lengths)
        losses = objective(*sides, token_losses=tokens)
        losses.mean().backward()
        return losses.detach(), self.grads()


def batch(counts=COUNTS, dtype=torch.float32, bias=False, v=V, length=L, **options) -> Batch:
    n = sum(counts)
    rows = torch.arange(n) % length  # both completions read the last prompt position
    made = Batch(
        torch.randn(2, length // 2, D).to(dtype),
        (torch.randn(v, D) * 0.6).to(dtype),
        torch.randn(v).to(dtype) if bias else None,
        TokenSelection(rows, torch.randint(v, (n,)), torch.tensor(counts), tuple(counts)),
        -6 * torch.rand(n, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        options,
    )
    return made.copies()


def compare(check, made: Batch, objective: Objective, path: str, **kwargs) -> None:
    truth = made.copies(torch.float64).oracle(objective)
    eager = made.copies().oracle(objective)
    out, grads = made.copies(path=path).run(objective, impl=path, **kwargs)
    length = V + D + sum(made.selection.counts)
    # Losses and their coefficients carry the roundings of log-probs that are far larger.
    check("losses", out.losses, eager[0], truth[0], 4 * length)
    assert torch.equal(out.loss.detach(), out.losses.sum() / len(out.losses))
    expected = {"score": 0, "frozen": 1}.get(path, 2 + (made.bias is not None))
    assert len(grads) == expected
    for name, grad in grads.items():
        check(f"gradient of {name}", grad, eager[1][name], truth[1][name], 4 * length)


OBJECTIVES = {
    "dpo": Objective.parse("dpo", beta=0.2),
    "ipo-norm": Objective.parse("ipo_norm", beta=0.3),
    "simpo": Objective.parse("simpo"),
    "orpo": Objective.parse("orpo"),
    "apa": Objective.parse("apa", lam=2.0),
    "mixture": Objective.parse(["dpo", "sft", "awr"], weights=[1.0, 0.5, 0.25]),
}


@pytest.mark.parametrize(
    ("objective", "path", "dtype"),
    [
        *(pytest.param(o, "single_pass", torch.float32, id=f"{o}-single_pass") for o in OBJECTIVES),
        *(pytest.param("mixture", p, torch.float32, id=f"mixture-{p}") for p in PATHS[1:]),
        pytest.param("dpo", "single_pass", torch.float64, id="dpo-single_pass-fp64"),
        pytest.param("dpo", "single_pass", torch.bfloat16, id="dpo-single_pass-bf16"),
        pytest.param("dpo", "single_pass", torch.float16, id="dpo-single_pass-fp16"),
        pytest.param("dpo", "frozen", torch.bfloat16, id="dpo-frozen-bf16"),
        pytest.param("dpo", "reference", torch.float32, id="dpo-reference"),
    ],
)
def test_every_path_is_as_accurate_as_plain_torch(within_budget, objective, path, dtype):
    compare(within_budget, batch(dtype=dtype), OBJECTIVES[objective], path, tile_rows=14)


@pytest.mark.parametrize(
    ("head", "path"),
    [
        pytest.param({"bias": True}, "single_pass", id="bias"),
        pytest.param({"softcap": 2.0}, "single_pass", id="softcap"),
        pytest.param({"logit_scale": 0.3}, "single_pass", id="scale"),
        pytest.param({"temperature": 1.9}, "single_pass", id="temperature"),
        pytest.param(
            {"bias": True, "softcap": 3.0, "logit_scale": 1.4, "temperature": 0.7},
            "single_pass", id="everything",
        ),
        pytest.param({"bias": True, "softcap": 3.0}, "recompute", id="recompute"),
    ],
)  # fmt: skip
def test_head_options(within_budget, head, path):
    compare(within_budget, batch(**head), OBJECTIVES["dpo"], path, tile_rows=14)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(1, id="every-pair-beyond-the-budget"),
        pytest.param(5, id="one-pair-fits"),
        pytest.param(15, id="the-longest-pair-just-fits"),
        pytest.param(20, id="two-pairs-a-chunk"),
        pytest.param(49, id="everything-just-fits"),
        pytest.param(1000, id="far-more-than-needed"),
    ],
)
@pytest.mark.parametrize("objective", ["dpo", "mixture"])
def test_chunks_do_not_change_the_result(objective, rows):
    made = batch(softcap=4.0, bias=True)
    expected, grads = made.copies().run(OBJECTIVES[objective])
    out, chunked = made.copies().run(OBJECTIVES[objective], tile_rows=rows)
    assert torch.equal(out.token_logps, expected.token_logps)
    assert torch.equal(out.losses, expected.losses)
    for name in grads:
        torch.testing.assert_close(chunked[name], grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("counts", "budget", "sizes"),
    [
        pytest.param((), 5, [], id="nothing"),
        pytest.param((3, 4), 5, [1], id="a-longer-pair-by-itself"),
        pytest.param((9, 9, 1, 1, 1, 1, 9, 9), 5, [1, 2, 1], id="between-longer-pairs"),
        pytest.param((2, 1, 1, 1, 1, 0), 5, [2, 1], id="exactly-full"),
        pytest.param((0, 0, 0, 0), 5, [2], id="empty-pairs"),
        pytest.param((5, 0, 0, 0, 0, 1), 5, [2, 1], id="empty-pairs-fit-a-full-chunk"),
    ],
)
def test_chunks_hold_whole_pairs_within_the_budget(counts, budget, sizes):
    chunks = chunks_of_pairs(counts, budget)
    assert [c.pairs.stop - c.pairs.start for c in chunks] == sizes
    ends = [0, *(sum(counts[: 2 * c.pairs.stop]) for c in chunks)]
    assert [(c.tokens.start, c.tokens.stop) for c in chunks] == list(pairwise(ends))


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param((0, 5, 4, 0), id="one-side"),
        pytest.param((3, 2, 0, 0, 1, 1), id="a-whole-pair"),
        pytest.param((0, 0, 2, 1), id="the-first-pair"),
        pytest.param((2, 1, 0, 0), id="the-last-pair"),
    ],
)
@pytest.mark.parametrize("path", PATHS[:3])
def test_empty_completions(within_budget, counts, path):
    made = batch(counts)
    compare(within_budget, made, OBJECTIVES["dpo"], path, tile_rows=3)
    out, grads = made.copies(path=path).run(OBJECTIVES["mixture"], impl=path)
    assert all(t.isfinite().all() for t in (out.losses, *grads.values()))
    sides = torch.stack([out.policy.chosen, out.policy.rejected], 1).flatten()
    assert (sides[torch.tensor(counts) == 0] == 0).all()


@pytest.mark.parametrize("path", PATHS[:3])
def test_a_batch_without_any_scored_token_gives_a_differentiable_zero_gradient(path):
    out, grads = batch((0, 0, 0, 0)).copies(path=path).run(OBJECTIVES["dpo"], impl=path)
    torch.testing.assert_close(out.loss.detach(), torch.tensor(math.log(2.0)))
    assert grads and all((g == 0).all() for g in grads.values())


def with_margins(margins, **options):
    """Four pairs with about these margins; the first is longer than a block of rows."""
    made = batch((300, 5, 8, 9, 6, 9, 4, 4), length=400, **options)
    far = torch.zeros(sum(made.selection.counts))
    shift = far.split(list(made.selection.counts))
    logps = made.copies().run(OBJECTIVES["dpo"])[0].token_logps
    for pair, margin in enumerate(margins):
        shift[2 * pair][0] -= margin  # a lower reference of the chosen side: a larger margin
    return made._replace(ref_token_logps=logps + far)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "bias": True}], ids=["plain", "softcap"])
@pytest.mark.parametrize("tile_rows", [None, 40], ids=["one-chunk", "a-pair-beyond-the-budget"])
def test_rows_of_a_satisfied_hinge_leave_the_products_and_change_nothing(options, tile_rows):
    made = with_margins((-50.0, 50.0, 50.0, -50.0), **options)
    objective = Objective.parse("slic", beta=0.1)
    out, grads = made.copies().run(objective, tile_rows=tile_rows)
    assert [x > 0 for x in out.losses.tolist()] == [True, False, False, True]
    expected, oracle = made.copies().oracle(objective)
    torch.testing.assert_close(out.losses, expected, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, oracle[name], rtol=1e-3, atol=1e-5)
    # Rows that only satisfied pairs read have no gradient at all, to the last bit.
    read_by_active = torch.zeros(400, dtype=torch.bool)
    rows = made.selection.rows.split(list(made.selection.counts))
    for sequence in (0, 1, 6, 7):
        read_by_active[rows[sequence]] = True
    hidden = grads["hidden_states"].flatten(0, 1)
    assert (hidden[~read_by_active] == 0).all()
    assert (hidden[read_by_active].abs().sum(1) > 0).all()


def test_only_satisfied_pairs_give_an_exact_zero():
    made = with_margins((50.0,) * 4)
    out, grads = made.copies().run(Objective.parse("slic", beta=0.1))
    assert out.loss == 0 and all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("name", ["kto", "aot"])
def test_coupled_losses_take_another_path(within_budget, name):
    made, objective = batch(), Objective.parse(name)
    compare(within_budget, made, objective, "auto", tile_rows=14)
    with pytest.raises(ValueError, match="impl='single_pass' cannot serve a loss that couples"):
        made.run(objective, impl="single_pass")


def test_advantages_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"advantages: expected shape \[8\], got \[4\]"):
        batch().run(Objective.parse(["apa", "dpo"]), advantages=torch.zeros(4))


def test_advantages_reach_token_level_losses():
    made = batch()
    advantages = torch.randn(len(COUNTS))
    out, _ = made.copies().run(Objective.parse("apa", lam=0.5), advantages=advantages, tile_rows=14)
    per_token = torch.cat([a.expand(n) for a, n in zip(advantages, COUNTS, strict=True)])
    error = (out.token_logps - made.ref_token_logps - per_token / 0.5).square()
    torch.testing.assert_close(out.loss.detach(), error.mean(), rtol=1e-5, atol=1e-5)


def test_ref_logps_and_their_tokens_are_the_same_reference():
    made, objective = batch(), OBJECTIVES["dpo"]
    tokens, grads = made.copies().run(objective)
    sums, grads_too = made.copies().run(
        objective,
        ref_token_logps=None,
        ref_logps=sequence_logps(made.ref_token_logps, made.selection.lengths),
    )
    assert torch.equal(tokens.losses, sums.losses)
    assert all(torch.equal(grads[k], grads_too[k]) for k in grads)


def test_ref_logps_win_over_the_sums_of_ref_token_logps():
    made = batch()
    both, _ = made.copies().run(OBJECTIVES["dpo"], ref_logps=made.ref_logps + 1.5)
    sums, _ = made.copies().run(
        OBJECTIVES["dpo"], ref_token_logps=None, ref_logps=made.ref_logps + 1.5
    )
    assert torch.equal(both.losses, sums.losses)


def test_completion_lengths_are_the_divisors_of_means():
    made = batch()
    lengths = made.selection.lengths + 1  # with the first token, which nothing predicts
    out, _ = made.copies().run(OBJECTIVES["ipo-norm"], completion_lengths=lengths)
    sums = reference.sequence_logps(out.token_logps - made.ref_token_logps, COUNTS) / lengths
    h = sums[::2] - sums[1::2]
    torch.testing.assert_close(out.losses, (h - 1 / 0.6).square(), rtol=1e-4, atol=1e-4)
    assert torch.equal(out.policy.chosen_lengths, lengths[::2])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tile_rows", [None, 5], ids=["whole", "chunked"])
def test_stats_come_from_every_path(path, tile_rows):
    made = batch(softcap=3.0)
    out, _ = made.copies(path=path).run(
        OBJECTIVES["dpo"], impl=path, stats=True, tile_rows=tile_rows
    )
    rows = made.hidden_states.reshape(-1, D)[made.selection.rows]
    expected = reference.token_stats(rows, made.weight, made.selection.targets, softcap=3.0)
    for got, want in zip(out.stats, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert not got.requires_grad
    plain, _ = made.copies(path=path).run(OBJECTIVES["dpo"], impl=path, tile_rows=tile_rows)
    assert plain.stats is None
    assert torch.equal(plain.losses, out.losses)


@pytest.mark.parametrize("path", PATHS)
def test_only_the_loss_carries_a_gradient(path):
    made = batch().copies(path=path)
    out = pair_loss(
        made.hidden_states, made.head, made.selection, OBJECTIVES["dpo"],
        ref_logps=made.ref_logps, impl=path,
    )  # fmt: skip
    assert out.loss.requires_grad == (path != "score")
    assert not any(t.requires_grad for t in (out.losses, out.token_logps, *out.policy))
    assert torch.equal(
        out.policy.chosen,
        sequence_logps(out.token_logps, made.selection.lengths)[::2],
    )


@pytest.mark.parametrize("path", PATHS[:3])
@pytest.mark.parametrize("name", ["dpo", "mixture"])
def test_parts_of_a_batch_add_up_to_the_batch(path, name):
    made, objective = batch(), OBJECTIVES[name]
    totals = BatchTotals(len(COUNTS) // 2, sum(COUNTS[::2]), sum(COUNTS))
    whole, expected = made.copies(path=path).run(objective, impl=path)
    parts = made.copies(path=path)
    loss = 0.0
    for first, last in ((0, 2), (2, 8)):
        tokens = slice(sum(COUNTS[:first]), sum(COUNTS[:last]))
        rows, targets = (t[tokens] for t in made.selection[:2])
        counts = COUNTS[first:last]
        selection = TokenSelection(rows, targets, torch.tensor(counts), counts)
        part = parts._replace(selection=selection, ref_token_logps=made.ref_token_logps[tokens])
        loss += part.run(objective, impl=path, totals=totals)[0].loss.detach()
    torch.testing.assert_close(loss, whole.loss.detach(), rtol=1e-5, atol=1e-6)
    for name, grad in parts.grads().items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def test_backward_twice_and_a_factor_on_the_loss():
    made = batch()
    _, expected = made.copies().run(OBJECTIVES["dpo"])
    ours = made.copies()
    out = pair_loss(
        ours.hidden_states, ours.head, ours.selection, OBJECTIVES["dpo"],
        ref_token_logps=ours.ref_token_logps,
    )  # fmt: skip
    (out.loss * 0.25).backward(retain_graph=True)
    (out.loss * 0.75).backward()
    for name, grad in ours.grads().items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7)


def test_bitwise_repeatable():
    made = batch(dtype=torch.bfloat16)
    first, grads = made.copies().run(OBJECTIVES["mixture"])
    again, grads_again = made.copies().run(OBJECTIVES["mixture"])
    assert torch.equal(first.losses, again.losses)
    assert all(torch.equal(grads[k], grads_again[k]) for k in grads)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_only_the_wanted_gradients_are_made(wanted):
    made = batch(bias=True)
    _, expected = made.copies().run(OBJECTIVES["dpo"])
    ours = made.copies()
    for i in range(3):
        ours[i].requires_grad_(i in wanted)
    _, grads = ours.run(OBJECTIVES["dpo"])
    assert list(grads) == [("hidden_states", "weight", "bias")[i] for i in wanted]
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def test_cpu_autocast_changes_nothing():
    made = batch()
    expected, grads = made.copies().run(OBJECTIVES["dpo"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, inside = made.copies().run(OBJECTIVES["dpo"])
    assert torch.equal(out.losses, expected.losses)
    assert all(torch.equal(grads[k], inside[k]) for k in grads)


# Identical policy and reference


@pytest.mark.parametrize(
    ("v", "dtype", "options"),
    [
        pytest.param(16000, torch.float32, {}, id="fp32"),
        pytest.param(16000, torch.bfloat16, {}, id="bf16"),
        pytest.param(5000, torch.float16, {"softcap": 5.0}, id="fp16-softcap"),
        pytest.param(5000, torch.float32, {"bias": True, "logit_scale": 0.5}, id="bias-scale"),
    ],
)
@pytest.mark.parametrize("path", PATHS[:3])
def test_identical_models_have_a_margin_of_exactly_zero(v, dtype, options, path):
    counts = (97, 130, 1, 300, 17, 96, 58, 1)
    made = batch(counts, dtype=dtype, v=v, length=700, **options).copies(path=path)
    rows = made.hidden_states.reshape(-1, D)[made.selection.rows]
    with torch.no_grad():  # the reference is scored with another budget, so in other blocks
        ref = head_logps(rows, made.head, made.selection.targets, max_bytes=4 * v * 111)
    out, _ = made.run(OBJECTIVES["dpo"], ref_token_logps=ref, impl=path, tile_rows=250)
    assert torch.equal(out.token_logps, ref)
    ref_logps = sequence_logps(ref, made.selection.lengths)
    margin = (out.policy.chosen - ref_logps[::2]) - (out.policy.rejected - ref_logps[1::2])
    assert (margin == 0).all()
    assert torch.equal(out.losses, torch.log(torch.tensor(2.0)).expand(4))
    assert torch.equal(out.loss.detach(), torch.log(torch.tensor(2.0)))


# Memory


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest storage that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return result


def largest(path: str, via: str, dtype: torch.dtype, max_bytes: int) -> int:
    n, v, d = 600, 3000, 8
    hidden = torch.randn(n, d).to(dtype).requires_grad_(path != "score")
    weight = torch.randn(v, d).to(dtype).requires_grad_(path not in ("score", "frozen"))
    targets = torch.randint(v, (n,))
    counts = (60,) * 10
    selection = TokenSelection(torch.arange(n), targets, torch.tensor(counts), counts)
    with LargestTensor() as seen:
        if via == "token_logps":
            loss = token_logps(hidden, weight, targets, impl=path, max_bytes=max_bytes).sum()
        else:
            loss = pair_loss(
                hidden, LmHead(weight), selection, OBJECTIVES["dpo"],
                ref_logps=torch.zeros(10), impl=path, max_bytes=max_bytes, stats=True,
            ).loss  # fmt: skip
        if path != "score":
            loss.backward()
    return seen.numel


@pytest.mark.parametrize(
    ("path", "via"),
    [
        pytest.param(path, via, id=f"{path}-{via}")
        for path in PATHS
        for via in ("token_logps", "pair_loss")
        if (path, via) != ("single_pass", "token_logps")
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_tensor_is_larger_than_the_budget(path, via, dtype):
    rows = 130  # a pair has 120 tokens, the batch 600
    assert largest(path, via, dtype, 4 * 3000 * rows) <= 3000 * (rows + 16)


def test_the_memory_test_sees_the_logits_of_plain_torch():
    assert largest("reference", "token_logps", torch.float32, 4 * 3000 * 130) >= 600 * 3000


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            {"ref_token_logps": None}, ValueError,
            r"ref_logps: expected \[8\] for dpo.*, got None", id="no-reference",
        ),
        pytest.param(
            {"ref_logps": torch.zeros(4)}, ValueError,
            r"ref_logps: expected shape \[8\], got \[4\]", id="ref-logps",
        ),
        pytest.param(
            {"ref_token_logps": torch.zeros(4)}, ValueError,
            r"ref_token_logps: expected shape \[49\], got \[4\]", id="ref-token-logps",
        ),
        pytest.param(
            {"completion_lengths": torch.zeros(4).long()}, ValueError,
            r"completion_lengths: expected shape \[8\], got \[4\]", id="completion-lengths",
        ),
        pytest.param(
            {"completion_lengths": torch.ones(8)}, TypeError,
            "completion_lengths: expected an int64 tensor, got torch.float32", id="float-lengths",
        ),
        pytest.param(
            {"advantages": torch.zeros(8)}, ValueError,
            r"advantages: expected None for dpo\(.*, got some; apa_pairs, awr_pairs do",
            id="advantages",
        ),
        pytest.param(
            {"impl": "fastest"}, ValueError, "impl: expected one of", id="impl",
        ),
        pytest.param(
            {"max_bytes": 3}, ValueError, "max_bytes: expected at least 524", id="max-bytes",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        batch().run(OBJECTIVES["dpo"], **change)


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        pytest.param(
            lambda s: s._replace(rows=s.rows[:-1]), ValueError,
            r"selection.rows: expected shape \[49\], got \[48\]", id="rows",
        ),
        pytest.param(
            lambda s: s._replace(targets=s.targets.int()), TypeError,
            "targets: expected an int64 tensor, got torch.int32", id="targets",
        ),
        pytest.param(
            lambda s: s._replace(lengths=s.lengths[:-1]), ValueError,
            r"selection.lengths: expected shape \[8\], got \[7\]", id="lengths",
        ),
        # A kernel would read the memory of another device.
        pytest.param(
            lambda s: s._replace(rows=s.rows.to("meta")), ValueError,
            "selection.rows: expected device cpu, got meta", id="rows-elsewhere",
        ),
        pytest.param(
            lambda s: s._replace(lengths=s.lengths.to("meta")), ValueError,
            "selection.lengths: expected device cpu, got meta", id="lengths-elsewhere",
        ),
        pytest.param(
            lambda s: TokenSelection(s.rows[:22], s.targets[:22], s.lengths[:3], (6, 9, 7)),
            ValueError, "selection: expected 2B > 0 sequences, got 3", id="odd",
        ),
        pytest.param(
            lambda s: TokenSelection(s.rows[:0], s.targets[:0], s.lengths[:0], ()),
            ValueError, "selection: expected 2B > 0 sequences, got 0", id="none",
        ),
    ],
)  # fmt: skip
def test_wrong_selections(selection, error, message):
    made = batch()
    made = made._replace(selection=selection(made.selection))
    with pytest.raises(error, match=message):
        made.run(OBJECTIVES["dpo"])


@pytest.mark.parametrize("impl", ["score", "frozen", "recompute", "single_pass"])
def test_statistics_cost_no_further_pass_over_the_vocabulary(monkeypatch, impl):
    products = []
    inner = tiles.logits_product
    monkeypatch.setattr(tiles, "logits_product", lambda *a: products.append(a) or inner(*a))
    rows, lengths = torch.randn(6, 4), (2, 4)
    selection = TokenSelection(
        torch.arange(6), torch.randint(0, 11, (6,)), torch.tensor(lengths), lengths
    )
    rows.requires_grad_(impl != "score")
    head = LmHead(torch.randn(11, 4, requires_grad=impl in ("recompute", "single_pass")))
    counts = []
    for stats in (False, True):
        products.clear()
        out = pair_loss(
            rows, head, selection, Objective.parse("dpo"), ref_logps=torch.zeros(2), stats=stats,
            impl=impl,
        )  # fmt: skip
        counts.append(len(products))
    assert counts[0] == counts[1] > 0
    _, want = token_stats(rows, head, selection.targets)
    for a, b in zip(out.stats, want, strict=True):
        assert not a.requires_grad
        assert torch.equal(a, b)
