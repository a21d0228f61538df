"""``token_logps``: every path, dtype and head option against fp64, and its life under autograd."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from tile_budget import tiles_of
from torch import Tensor

from fastdaa import LmHead, TokenStats, reference, sequence_logps, token_logps, token_stats
from fastdaa.logps import head_logps
from fastdaa.validation import check_lengths

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": 0.4},
    "negative-scale": {"logit_scale": -1.5},
    "temperature": {"temperature": 1.7},
    "everything": {"bias": True, "softcap": 3.0, "logit_scale": 1.6, "temperature": 0.8},
}
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
PATHS = ("score", "frozen", "recompute")
CASES = [
    pytest.param(path, dtype, head, id=f"{path}-{dtype}-{head}")
    for path in PATHS
    for dtype in DTYPES
    for head in (HEADS if dtype == "fp32" else ("plain", "everything"))
]
TINY = 4 * 5 * 203  # bytes of five rows of logits: blocks of 16 of the 37 tokens below


class Problem(NamedTuple):
    """Leaves of one call, and the coefficients of its loss."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    coefficients: Tensor
    options: dict[str, float]

    def copies(self, dtype: torch.dtype | None = None) -> Problem:
        """Fresh leaves, all with gradient, in ``dtype`` or as they are."""
        leaves = (
            None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
            for t in self[:3]
        )
        return Problem(*leaves, *self[3:])

    def call(self, fn, **kwargs) -> Tensor:
        return fn(
            self.hidden_states, self.weight, self.targets, bias=self.bias, **self.options, **kwargs
        )

    def loss(self, logps: Tensor) -> Tensor:
        return (logps * self.coefficients.to(logps.dtype)).sum()

    def run(self, fn, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probs, and gradients of everything that wants one."""
        logps = self.call(fn, **kwargs)
        self.loss(logps).backward()
        names = ("hidden_states", "weight", "bias")
        leaves = zip(names, self[:3], strict=True)
        grads = {k: t.grad for k, t in leaves if t is not None and t.requires_grad}
        return logps.detach(), grads


def problem(n=37, d=80, v=203, dtype="fp32", head="plain", weight_dtype=None, spread=3.0):
    options = dict(HEADS[head])
    bias = torch.randn(v) if options.pop("bias", False) else None
    hidden, weight = torch.randn(n, d), torch.randn(v, d) * spread / d**0.5
    made = Problem(
        hidden, weight, bias, torch.randint(v, (n,)), torch.randn(n, dtype=torch.float64), options
    )
    made = made.copies(DTYPES[dtype])
    if weight_dtype is not None:
        made = made._replace(weight=made.weight.detach().to(weight_dtype).requires_grad_())
    return made


def freeze(made: Problem, path: str) -> Problem:
    """The same problem with only the gradients that a path can give."""
    if path == "score":
        made.hidden_states.requires_grad_(False)
    if path in ("score", "frozen"):
        made.weight.requires_grad_(False)
        if made.bias is not None:
            made.bias.requires_grad_(False)
    return made


def compare(check, made: Problem, path: str, max_bytes: int | None = None) -> None:
    """One path and plain torch, both against fp64, for log-probs and all gradients."""
    vocab_size = made.weight.shape[0]
    if path == "frozen" and max_bytes is not None:
        # What it keeps does not fit into so little: small tiles by default.
        with tiles_of(max_bytes // (4 * vocab_size), vocab_size):
            compare(check, made, path)
        return
    kwargs = {"impl": path, "max_bytes": max_bytes}
    truth = made.copies(torch.float64).run(reference.token_logps)
    eager = made.copies().run(reference.token_logps)
    ours = freeze(made.copies(), path)
    length = sum(made.hidden_states.shape) + made.weight.shape[0]  # of all sums on the way
    if path == "score":
        check("logps", ours.call(token_logps, **kwargs), eager[0], truth[0], length)
        return
    logps, grads = ours.run(token_logps, **kwargs)
    check("logps", logps, eager[0], truth[0], length)
    assert set(grads) == (set(truth[1]) if path == "recompute" else {"hidden_states"})
    for name, grad in grads.items():
        check(f"gradient of {name}", grad, eager[1][name], truth[1][name], length)


@pytest.mark.parametrize(("path", "dtype", "head"), CASES)
def test_every_path_is_as_accurate_as_plain_torch(within_budget, path, dtype, head):
    compare(within_budget, problem(dtype=dtype, head=head), path, max_bytes=TINY)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("n", "d", "v", "max_bytes"),
    [
        pytest.param(1, 80, 203, None, id="one-token"),
        pytest.param(1, 1, 1, None, id="one-of-everything"),
        pytest.param(5, 3, 2, None, id="vocabulary-of-two"),
        pytest.param(0, 16, 33, None, id="no-token"),
        pytest.param(19, 16, 50257, 4 * 50257, id="gpt2-vocabulary-one-row-at-a-time"),
        pytest.param(300, 24, 9001, None, id="more-than-one-column-tile-and-row-block"),
    ],
)
def test_odd_sizes(within_budget, path, n, d, v, max_bytes):
    made = problem(n, d, v, head="everything" if v < 10000 else "plain")
    compare(within_budget, made, path, max_bytes=max_bytes)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("hidden", "weight", "result"),
    [
        pytest.param("bf16", torch.float32, torch.float32, id="bf16-hidden-fp32-weight"),
        pytest.param("fp32", torch.bfloat16, torch.float32, id="fp32-hidden-bf16-weight"),
        pytest.param("fp16", torch.bfloat16, torch.float32, id="fp16-hidden-bf16-weight"),
        pytest.param("fp32", torch.float64, torch.float64, id="fp32-hidden-fp64-weight"),
    ],
)
def test_mixed_dtypes(within_budget, path, hidden, weight, result):
    made = problem(dtype=hidden, weight_dtype=weight)
    compare(within_budget, made, path, max_bytes=TINY)
    assert freeze(made, path).call(token_logps).dtype == result


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(("weight",), id="weight"),
        pytest.param(("bias",), id="bias"),
        pytest.param(("hidden_states", "bias"), id="hidden-states-and-bias"),
        pytest.param(("weight", "bias"), id="weight-and-bias"),
        pytest.param(("hidden_states", "weight"), id="hidden-states-and-weight"),
    ],
)
def test_only_the_wanted_gradients_are_made(within_budget, wanted):
    made = problem(head="everything")
    truth = made.copies(torch.float64).run(reference.token_logps)[1]
    eager = made.copies().run(reference.token_logps)[1]
    ours = made.copies()
    for name in ("hidden_states", "weight", "bias"):
        getattr(ours, name).requires_grad_(name in wanted)
    _, grads = ours.run(token_logps, max_bytes=TINY)
    assert set(grads) == set(wanted)
    for name, grad in grads.items():
        within_budget(name, grad, eager[name], truth[name], 320)


def test_strided_inputs():
    made = problem(n=37, d=80, v=203, head="bias")
    expected = made.copies().run(token_logps)
    hidden = torch.randn(37, 160)
    hidden[:, ::2] = made.hidden_states.detach()
    weight = made.weight.detach().T.contiguous().T  # column-major, as `x @ W` code stores it
    padded = torch.randn(300, 80)
    padded[50:253] = weight
    for w in (weight, padded[50:253]):
        strided = made._replace(
            hidden_states=hidden[:, ::2].detach().requires_grad_(),
            weight=w.detach().requires_grad_(),
        )
        logps, grads = strided.run(token_logps)
        torch.testing.assert_close(logps, expected[0], rtol=1e-6, atol=1e-5)
        for name in ("hidden_states", "weight"):
            torch.testing.assert_close(grads[name], expected[1][name], rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_base_of_a_view():
    made = problem(n=12, d=16, v=50)
    full = torch.cat([made.weight.detach(), torch.zeros(6, 16)]).requires_grad_()
    hidden = made.hidden_states.detach().view(3, 4, 16).requires_grad_()
    logps = token_logps(hidden.flatten(0, 1), full[:50], made.targets)
    made.loss(logps).backward()
    _, expected = made.copies().run(reference.token_logps)
    torch.testing.assert_close(full.grad[:50], expected["weight"], rtol=1e-4, atol=1e-5)
    assert full.grad[50:].abs().max() == 0
    torch.testing.assert_close(
        hidden.grad.flatten(0, 1), expected["hidden_states"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("path", PATHS)
def test_cpu_autocast_changes_nothing(path):
    outside = freeze(problem(head="everything"), path)
    inside = outside.copies()
    freeze(inside, path)
    expected = outside.call(token_logps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = inside.call(token_logps)
    assert torch.equal(got, expected)
    if path != "score":
        outside.loss(expected).backward()
        inside.loss(got).backward()
        assert torch.equal(inside.hidden_states.grad, outside.hidden_states.grad)


@pytest.mark.parametrize("path", ["frozen", "recompute"])
def test_backward_twice_gives_the_same_and_accumulates(path):
    made = freeze(problem(head="bias"), path)
    loss = made.loss(made.call(token_logps, max_bytes=TINY))
    loss.backward(retain_graph=True)
    leaves = [t for t in made[:3] if t is not None and t.requires_grad]
    once = [t.grad.clone() for t in leaves]
    loss.backward()
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip(leaves, once, strict=True))


@pytest.mark.parametrize("path", ["frozen", "recompute"])
def test_a_result_may_be_changed_in_place(path):
    made = freeze(problem(), path)
    logps = made.call(token_logps)
    logps *= 2.0
    made.loss(logps).backward()
    expected = made.copies()
    (2.0 * expected.loss(expected.call(reference.token_logps))).backward()
    torch.testing.assert_close(
        made.hidden_states.grad, expected.hidden_states.grad, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("path", ["frozen", "recompute"])
def test_a_result_in_two_expressions_gets_the_sum_of_their_coefficients(path):
    made = freeze(problem(), path)
    logps = made.call(token_logps)
    (made.loss(logps) + logps.exp().sum()).backward()
    expected = made.copies()
    logps = expected.call(reference.token_logps)
    (expected.loss(logps) + logps.exp().sum()).backward()
    torch.testing.assert_close(
        made.hidden_states.grad, expected.hidden_states.grad, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("path", ["frozen", "recompute"])
def test_bitwise_repeatable(path):
    made = problem(n=300, v=5000, dtype="bf16")
    logps, grads = freeze(made.copies(), path).run(token_logps)
    again, grads_again = freeze(made.copies(), path).run(token_logps)
    assert torch.equal(logps, again)
    assert all(torch.equal(grads[k], grads_again[k]) for k in grads)


@pytest.mark.parametrize("threads", [1, 2], ids=["one-thread", "two-threads"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_paths_and_budgets_agree_to_the_last_bit(dtype, threads):
    torch.set_num_threads(threads)
    made = problem(n=24, d=16, v=40003, dtype=dtype)
    with torch.no_grad():
        expected = made.call(token_logps)
    one_row = 4 * 40003
    for max_bytes in (one_row, 7 * one_row, None):
        for path in PATHS:
            logps = freeze(made.copies(), path).call(token_logps, max_bytes=max_bytes)
            assert torch.equal(logps, expected), (path, max_bytes)
    # A part of the tokens by themselves, as in a batch of other pairs.
    part = token_logps(made.hidden_states[17:18], made.weight, made.targets[17:18])
    assert torch.equal(part, expected[17:18])


def test_under_no_grad_nothing_is_kept():
    with torch.no_grad():
        assert not problem().call(token_logps).requires_grad


def test_head_logps_reads_every_option_of_the_head():
    made = problem(head="everything")
    head = LmHead(made.weight, made.bias, **made.options)
    got = head_logps(made.hidden_states, head, made.targets)
    assert torch.equal(got, made.call(token_logps))


# Accuracy contract


def test_a_bf16_sequence_of_512_peaked_tokens_is_within_a_millinat():
    n, d, v = 512, 128, 4000
    weight = torch.randn(v, d).bfloat16()
    targets = torch.randint(v, (n,))
    hidden = 0.3 * weight.float()[targets] + torch.randn(n, d)
    hidden[::3] = torch.randn(len(hidden[::3]), d) * 0.9  # some tokens are a surprise
    hidden = hidden.bfloat16()
    truth = reference.token_logps(hidden.double(), weight.double(), targets)
    assert reference.logits(hidden.double(), weight.double()).amax() > 40
    assert (truth > -1e-3).any() and (truth < -10).any()
    for path in PATHS:
        leaf = hidden.clone().requires_grad_(path != "score")
        head = weight.clone().requires_grad_(path == "recompute")
        logps = token_logps(leaf, head, targets, impl=path)
        total = sequence_logps(logps, torch.tensor([n]))
        assert abs(total.double().item() - truth.sum().item()) < 1e-3, path
    rounded = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None]).sum()
    assert abs(rounded.item() - truth.sum().item()) > 1e-2  # the test can tell bf16 logits


# Statistics


@pytest.mark.parametrize(
    ("dtype", "head"),
    [
        pytest.param("fp32", "plain", id="fp32-plain"),
        pytest.param("fp32", "everything", id="fp32-everything"),
        pytest.param("bf16", "everything", id="bf16-everything"),
        pytest.param("fp64", "softcap", id="fp64-softcap"),
    ],
)
def test_stats_are_as_accurate_as_plain_torch(within_budget, dtype, head):
    made = problem(dtype=dtype, head=head)
    lm_head = LmHead(made.weight, made.bias, **made.options)
    logps, stats = token_stats(made.hidden_states, lm_head, made.targets, max_bytes=TINY)
    eager = made.call(reference.token_stats)
    truth = made.copies(torch.float64).call(reference.token_stats)
    for name, *values in zip(TokenStats._fields, stats, eager, truth, strict=True):
        within_budget(name, *values, 320)
    assert torch.equal(logps, made.call(token_logps).detach())
    assert not any(t.requires_grad for t in (logps, *stats))


def test_stats_of_certain_and_of_uniform_predictions():
    weight = torch.tensor([[500.0], [0.0], [0.0], [0.0]])
    hidden = torch.tensor([[1.0], [0.0]])
    logps, stats = token_stats(hidden, LmHead(weight), torch.tensor([0, 2]))
    torch.testing.assert_close(logps, torch.tensor([0.0, -math.log(4.0)]))
    torch.testing.assert_close(stats.entropy, torch.tensor([0.0, math.log(4.0)]))
    assert stats.top1.tolist() == [1.0, 1.0]
    assert stats.mean_logit.tolist() == [125.0, 0.0]
    torch.testing.assert_close(stats.log_sum_sq, torch.tensor([0.0, -math.log(4.0)]))


def test_stats_of_no_token():
    logps, stats = token_stats(torch.zeros(0, 4), LmHead(torch.ones(3, 4)), torch.zeros(0).long())
    assert [t.shape for t in (logps, *stats)] == [(0,)] * 5


# Sequence sums


def test_sequence_sums_are_exact_for_long_sequences():
    logps = -torch.rand(20000) * 12
    lengths = torch.tensor([7000, 0, 12999, 1])
    got = sequence_logps(logps, lengths)
    expected = reference.sequence_logps(logps.double(), lengths.tolist())
    assert got.dtype == torch.float32
    assert torch.equal(got, expected.float())


@pytest.mark.parametrize(
    ("logps", "lengths", "error", "message"),
    [
        ([1.0] * 5, [4, 4], ValueError, "lengths: expected a sum of 5 tokens, got 8"),
        ([1.0] * 5, [5, 2_000_000_000], ValueError, "lengths: expected a sum of 5 tokens, got 2"),
        ([1.0] * 5, [2, 2], ValueError, "lengths: expected a sum of 5 tokens, got 4"),
        ([1.0] * 5, [6, -1], ValueError, "lengths: expected 0 or more, got -1"),
        ([1.0] * 5, [[5]], ValueError, r"lengths: expected shape \[S\], got \[1, 1\]"),
        ([1.0] * 5, [5.0], TypeError, "lengths: expected an int64 tensor, got torch.float32"),
        ([[1.0]], [1], ValueError, r"token_logps: expected shape \[1\], got \[1, 1\]"),
        ([1], [1], TypeError, "token_logps: expected fp16, bf16, fp32 or fp64, got torch.int64"),
    ],
    ids=["beyond", "far-beyond", "short", "negative", "matrix", "floats", "logps", "integers"],
)
def test_lengths_that_are_not_those_of_the_tokens(logps, lengths, error, message):
    with pytest.raises(error, match=message):
        sequence_logps(torch.tensor(logps), torch.tensor(lengths))


def test_lengths_on_a_device_are_not_read():
    lengths = torch.tensor([4, 4], device="meta")
    check_lengths("lengths", lengths, 5)


def test_sequence_sums_pass_gradients_on():
    logps = torch.randn(6).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: sequence_logps(x, torch.tensor([2, 0, 3, 1])) ** 2, [logps]
    )
    empty = torch.zeros(0, requires_grad=True)
    sums = sequence_logps(empty, torch.tensor([0, 0]))
    assert sums.tolist() == [0.0, 0.0]
    sums.sum().backward()
    assert empty.grad.shape == (0,)


# What is refused

H, W, T = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: token_logps(H.long(), W, T), TypeError,
            "hidden_states: expected fp16, bf16, fp32 or fp64, got torch.int64", id="int-hidden",
        ),
        pytest.param(
            lambda: token_logps(H, W.to(torch.int8), T), TypeError,
            "weight: expected fp16, bf16, fp32 or fp64, got torch.int8", id="int8-weight",
        ),
        pytest.param(
            lambda: token_logps(H.tolist(), W, T), TypeError,
            "hidden_states: expected a torch.Tensor, got list", id="list",
        ),
        pytest.param(
            lambda: token_logps(H[None], W, T), ValueError,
            r"hidden_states: expected shape \[N, D\], got \[1, 3, 4\]", id="hidden-3d",
        ),
        pytest.param(
            lambda: token_logps(H, W.T, T), ValueError,
            r"weight: expected shape \[V, D\] with D = 4 .* got \[4, 7\]", id="weight-transposed",
        ),
        pytest.param(
            lambda: token_logps(H, W, T.int()), TypeError,
            "targets: expected an int64 tensor, got torch.int32", id="int32-targets",
        ),
        pytest.param(
            lambda: token_logps(H, W, T[:2]), ValueError,
            r"targets: expected shape \[3\], got \[2\]", id="targets-short",
        ),
        pytest.param(
            lambda: token_logps(H, W, T, bias=torch.zeros(6)), ValueError,
            r"bias: expected shape \[7\], got \[6\]", id="bias-short",
        ),
        pytest.param(
            lambda: token_logps(H, W.to("meta"), T), ValueError,
            "weight: expected device cpu as hidden_states, got meta", id="device",
        ),
        pytest.param(
            lambda: token_logps(H, W, T, softcap=0.0), ValueError,
            "softcap: expected a finite number above 0, got 0.0", id="softcap",
        ),
        pytest.param(
            lambda: token_logps(H, W, T, temperature=-1.0), ValueError,
            "temperature: expected a finite number above 0, got -1.0", id="temperature",
        ),
        pytest.param(
            lambda: token_logps(H, W, T, logit_scale=0.0), ValueError,
            "logit_scale: expected a number other than 0, got 0.0", id="scale",
        ),
        pytest.param(
            lambda: token_logps(H, W, T, impl="fast"), ValueError,
            "impl: expected one of 'auto', .* got 'fast'", id="impl",
        ),
        pytest.param(
            lambda: token_logps(H.clone().requires_grad_(), W, T, impl="score"), ValueError,
            "impl='score' gives no gradient", id="score-with-gradient",
        ),
        pytest.param(
            lambda: token_logps(H, W.clone().requires_grad_(), T, impl="frozen"), ValueError,
            "impl='frozen' gives the head no gradient", id="frozen-with-trained-head",
        ),
        pytest.param(
            lambda: token_logps(
                H.repeat(9, 1), W, T.repeat(9), impl="single_pass", max_bytes=720
            ),
            ValueError,
            "impl='single_pass' with the loss outside the call: expected .* 27 tokens",
            id="single-pass",
        ),
        pytest.param(
            lambda: token_logps(H, W, T, max_bytes=27), ValueError,
            r"max_bytes: expected at least 28 \(one fp32 row of 7 logits\), got 27", id="max-bytes",
        ),
        pytest.param(
            lambda: token_stats(H, LmHead(W), T[:1]), ValueError,
            r"targets: expected shape \[3\], got \[1\]", id="stats-targets",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", [-1, 7], ids=["negative", "beyond-the-vocabulary"])
def test_target_ids_outside_the_vocabulary_raise_on_cpu(path, target):
    hidden, weight = H.clone().requires_grad_(path != "score"), W.clone()
    with pytest.raises(ValueError, match=rf"targets: expected token ids from 0 to 6, got {target}"):
        token_logps(hidden, weight, torch.full((3,), target), impl=path)


def test_recompute_never_holds_a_wide_gradient_of_the_whole_weight():
    """Each slice of it is summed over all tokens, rounded and written once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    v, d = 3 * 4096 + 7, 64
    largest = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest.append(out.numel())
            return out

    hidden = torch.randn(5, d, requires_grad=True)
    weight = torch.randn(v, d).bfloat16().requires_grad_()
    targets = torch.randint(0, v, (5,))
    total = token_logps(hidden, weight, targets, impl="recompute").sum()
    with Record():
        (grad,) = torch.autograd.grad(total, weight)
    assert max(largest) < v * d / 2
    wide = weight.detach().float().requires_grad_()
    reference.token_logps(hidden, wide, targets).sum().backward()
    assert grad.dtype == torch.bfloat16
    assert torch.allclose(grad.float(), wide.grad, rtol=2**-7, atol=1e-4)
