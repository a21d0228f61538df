"""``pair_loss`` under ``torch.compile``: on every path the plan, and the bits, of an eager call."""

from __future__ import annotations

import pytest
import torch
from kept_calls import keep_at_most

from fastdaa import LmHead, Objective, TokenSelection, compiled_loss, memory, pair_loss
from fastdaa.compiled_backward import Saved
from fastdaa.modules import FusedLinearPairLoss
from fastdaa.outputs import STATISTICS
from fastdaa.single_pass_memory import SinglePassRoom

D, V = 8, 33
COUNTS = (3, 4, 2, 3)
N = sum(COUNTS)
HALF = torch.bfloat16


@pytest.fixture
def in_chunks(monkeypatch):
    """``in_chunks()``: the gradients of the logits of 6 tokens fit, the batch's do not."""
    whole = SinglePassRoom.whole

    def start():
        monkeypatch.setattr(memory, "_CPU_BYTES", (4 * V * 4, 4 * V * 6))
        keep_at_most(monkeypatch, 2 * V * 6)
        monkeypatch.setattr(
            SinglePassRoom, "whole", lambda self: None if self.size.tokens > 6 else whole(self)
        )

    return start


@pytest.fixture
def kept_batches(monkeypatch):
    """Rows and gradients of logits, ``(N, a)``, of every batch that is kept until backward."""
    seen = []
    keep = compiled_loss.keep_gradients

    def spy(logits, *args):
        results, waiting = keep(logits, *args)
        seen.append((logits.hidden_states.shape[0], waiting.kept.dz.shape[0]))
        return results, waiting

    monkeypatch.setattr(compiled_loss, "keep_gradients", spy)
    return seen


def tensors(dtype=torch.float32, trained=True, bias=False):
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_(trained)
    return hidden, weight, torch.randn(V).to(dtype).requires_grad_(trained) if bias else None


def loss_of(leaves, name, *, refs=(-12.0,) * 4, options=None, **kwargs):
    """A call whose result touches every output."""
    hidden, weight, bias = leaves
    targets = torch.randint(0, V, (N,))
    selection = TokenSelection(torch.arange(N), targets, torch.tensor(COUNTS), COUNTS)
    objective = Objective.parse(name)

    def loss():
        out = pair_loss(
            torch.tanh(hidden)[None], LmHead(weight, bias, **(options or {})), selection, objective,
            ref_logps=torch.tensor(refs), stats=True, **kwargs,
        )  # fmt: skip
        assert out.stats is not None
        rest = (out.losses, out.token_logps, out.stats.entropy, out.policy.chosen)
        assert not any(t.requires_grad for t in rest)
        # A power of two below: paths multiply by it at different places.
        return out.loss * 2.0 + sum(t.sum() for t in rest)

    return loss


def one_node(loss):
    return torch.compile(loss, backend="aot_eager", fullgraph=True)


CASES = [
    pytest.param("dpo", {}, {}, id="single-pass"),
    pytest.param("ipo", {"trained": False}, {}, id="frozen"),
    pytest.param("slic", {"trained": False}, {"impl": "single_pass"}, id="frozen-single-pass"),
    pytest.param(
        "apa", {}, {"impl": "recompute", "ref_token_logps": -4 * torch.ones(N)}, id="recompute"
    ),
    pytest.param("aot", {}, {}, id="coupled"),
    pytest.param(
        "exo_pair",
        {"trained": False},
        {"engine": "triton"},
        id="frozen-triton",
        marks=pytest.mark.interpreter,
    ),
    pytest.param("aot", {"trained": False}, {}, id="coupled-frozen"),
    pytest.param("dpo", {"trained": False}, {"max_bytes": 16 * N * D}, id="frozen-fits"),
    pytest.param("slic", {"trained": False}, {"max_bytes": 8 * N * D}, id="frozen-does-not-fit"),
    pytest.param(
        "dpo", {"dtype": HALF, "bias": True}, {"options": {"softcap": 3.0}}, id="widened-options"
    ),
]


@pytest.mark.parametrize(("name", "made", "kwargs"), CASES)
def test_pair_loss_is_one_node(same_compiled, name, made, kwargs):
    leaves = tensors(**made)
    loss = loss_of(leaves, name, **kwargs)
    same_compiled(one_node(loss), loss, leaves)


KEPT_CASES = [
    pytest.param("dpo", {"bias": True}, {"options": {"softcap": 3.0}}, (N, N), id="dpo"),
    pytest.param("slic", {}, {"refs": (25.0, 0.0, 0.0, 25.0)}, (N, 7), id="one-pair-satisfied"),
    pytest.param("slic", {}, {"refs": (-99.0, 50.0) * 2}, (N, 0), id="all-pairs-satisfied"),
    pytest.param("kto", {}, {}, (N, N), id="coupled"),
    pytest.param("ipo", {"trained": False}, {"impl": "single_pass"}, (N, N), id="hidden-alone"),
]


@pytest.mark.parametrize(("name", "made", "kwargs", "kept"), KEPT_CASES)
def test_gradients_of_logits_are_kept(
    same_compiled, half_factors, kept_batches, name, made, kwargs, kept
):
    half_factors(HALF)
    leaves = tensors(HALF, **made)
    loss = loss_of(leaves, name, **kwargs)
    same_compiled(one_node(loss), loss, leaves)
    assert kept_batches == [kept]


@pytest.mark.parametrize(
    ("name", "kept"), [("dpo", []), ("slic", []), ("aot", [(N, N)])], ids=["dpo", "slic", "coupled"]
)
def test_batches_that_do_not_fit(same_compiled, half_factors, in_chunks, kept_batches, name, kept):
    """In chunks, or in part."""
    half_factors(HALF)
    in_chunks()
    leaves = tensors(HALF, bias=True)
    loss = loss_of(leaves, name)
    same_compiled(one_node(loss), loss, leaves)
    assert kept_batches == kept


def test_one_graph_for_lengths_that_fit_and_that_do_not(
    same_compiled, half_factors, in_chunks, kept_batches
):
    half_factors(HALF)
    in_chunks()
    weight = torch.randn(V, D).to(HALF).requires_grad_()
    module, graphs = FusedLinearPairLoss("dpo"), []

    def model(x, labels, ref):
        return module(torch.tanh(x), weight, labels, ref_logps=ref).loss

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for tokens in (16, 4, 24, 0):
        width = tokens // 4 + 1 if tokens else 3
        x = torch.randn(4, width, D).to(HALF).requires_grad_()
        labels = torch.randint(0, V, (4, width)) if tokens else torch.full((4, width), -100)
        call = (x, labels, -5 * torch.ones(4))
        same_compiled(
            lambda call=call: compiled(*call), lambda call=call: model(*call), [x, weight]
        )
    assert kept_batches == [(4, 4)]  # of the four batches
    assert len(graphs) == 1


def operator(leaves, name, operand, impl="auto", max_bytes=None, wanted=(True, True, True)):
    """Arguments of ``fastdaa::pair_loss``."""
    targets = torch.randint(0, V, (N,))
    return (
        *leaves, targets, torch.arange(N), torch.tensor(COUNTS), -9 * torch.ones(4), None, None,
        None, Objective.parse(name).key, None, None, 3.0, 0.5, 1.0, None, None, operand, impl,
        "auto", max_bytes, True, list(wanted),
    )  # fmt: skip


def saved_of(output):
    """The outputs of ``fastdaa::pair_loss`` behind loss, losses, log-probs and statistics."""
    return output[3 + STATISTICS :]


def gradient_operator(arguments, output):
    """Arguments of ``fastdaa::pair_loss_gradients`` for a call and what it returned."""
    named, settings = arguments[10], arguments[13:]
    return (torch.tensor(1.0), *arguments[:5], output[2], *saved_of(output), named, *settings)


SUMS = {"hidden", "hidden_scales", "weight", "weight_scales", "bias"}


@pytest.mark.parametrize(
    ("name", "operand", "impl", "saved"),
    [
        pytest.param("dpo", HALF, "auto", {"coefficients", "dz", "factors", "own"}, id="kept"),
        pytest.param(
            "slic", HALF, "auto", {"coefficients", "dz", "factors", "own"}, id="kept-sparse"
        ),
        pytest.param("dpo", torch.float32, "auto", SUMS, id="chunks"),
        pytest.param("aot", torch.float32, "auto", {"coefficients", "m", "log_s"}, id="coupled"),
        pytest.param("dpo", HALF, "recompute", {"coefficients", "m", "log_s"}, id="recompute"),
    ],
)
def test_operators_pass_the_library_check_and_save_no_more_than_an_eager_call(
    half_factors, name, operand, impl, saved
):
    """torch.library.opcheck: schema, fake implementation, autograd registration."""
    half_factors(operand)
    leaves = tensors(HALF, bias=True)
    arguments = operator(leaves, name, operand, impl)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fastdaa.pair_loss.default, arguments, test_utils=checks)
    with torch.no_grad():
        output = torch.ops.fastdaa.pair_loss(*arguments)
        kept = Saved(*saved_of(output))
        assert {field for field, t in zip(Saved._fields, kept, strict=True) if t.numel()} == saved
        more = gradient_operator(arguments, output)
        torch.library.opcheck(
            torch.ops.fastdaa.pair_loss_gradients.default, more, test_utils=checks[:2]
        )
        grads = torch.ops.fastdaa.pair_loss_gradients(*more)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    assert [g.shape for g in grads] == [t.shape for t in leaves]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("name", "impl"),
    [("dpo", "auto"), ("aot", "auto"), ("dpo", "single_pass"), ("slic", "recompute")],
)
def test_without_gradients_the_graph_has_the_bits_of_an_eager_call(name, impl, mode):
    loss = loss_of(tensors(), name, impl=impl)
    with mode():
        assert torch.equal(one_node(loss)(), loss())


def test_a_frozen_head_saves_its_slopes():
    arguments = operator(
        (tensors()[0], *tensors(trained=False, bias=True)[1:]), "dpo", torch.float32,
        wanted=(True, False, False),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fastdaa.pair_loss.default, arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    kept = Saved(*saved_of(torch.ops.fastdaa.pair_loss(*arguments)))
    fields = {field for field, t in zip(Saved._fields, kept, strict=True) if t.numel()}
    assert fields == {"coefficients", "hidden", "hidden_scales"}


# PyTorch's own use of what it deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_inductors_partition_of_the_graph_keeps_the_bits(
    same_compiled, half_factors, in_chunks, kept_batches
):
    """Sizes that are known when the graph runs go from its forward to its backward half."""
    half_factors(HALF)
    in_chunks()
    weight = torch.randn(V, D).to(HALF).requires_grad_()
    module = FusedLinearPairLoss("dpo")

    def model(x, labels, ref):
        # Nothing that a decomposition rounds in another way.
        return module(x * 2.0, weight, labels, ref_logps=ref).loss * 4.0

    compiled = torch.compile(
        model, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=True
    )
    for width in (5, 2):
        x = torch.randn(4, width, D).to(HALF).requires_grad_()
        call = (x, torch.randint(0, V, (4, width)), -5 * torch.ones(4))
        same_compiled(
            lambda call=call: compiled(*call), lambda call=call: model(*call), [x, weight]
        )
    assert kept_batches == [(4, 4)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dpo", "slic", "aot"])
def test_bf16_on_a_gpu(same_compiled, kept_batches, name):
    hidden, weight, _ = tensors(HALF)
    leaves = [t.detach().cuda().requires_grad_() for t in (hidden, weight)]
    targets, lengths = torch.randint(0, V, (N,)).cuda(), torch.tensor(COUNTS).cuda()
    selection = TokenSelection(torch.arange(N).cuda(), targets, lengths, COUNTS)
    objective, ref = Objective.parse(name), -9 * torch.ones(4).cuda()

    def loss():
        return pair_loss(leaves[0], LmHead(leaves[1]), selection, objective, ref_logps=ref).loss

    same_compiled(one_node(loss), loss, leaves)
    assert kept_batches[0][0] == N
