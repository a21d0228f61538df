"""``torch.compile`` as it comes, without ``fullgraph``: one graph forward and one backward."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from fastdaa import (
    BatchTotals,
    FusedLinearAPALoss,
    FusedLinearDPOLoss,
    FusedLinearIPOLoss,
    FusedLinearPairLoss,
    FusedLinearSLiCLoss,
    LmHead,
    Objective,
    TokenSelection,
    compiled_sizes,
    pair_loss,
    select_pairs,
)

D, V = 8, 33


class Model(nn.Module):
    def __init__(self, loss, online=False, trained=("body", "lm_head")):
        super().__init__()
        self.body, self.lm_head, self.loss = nn.Linear(D, D), nn.Linear(D, V, bias=False), loss
        self.online = online
        for name in ("body", "lm_head"):
            getattr(self, name).requires_grad_(name in trained)

    def forward(self, x, labels, ref):
        reference = {"ref_hidden_states": x} if self.online else {"ref_logps": ref}
        hidden = torch.tanh(self.body(x))
        return self.loss(hidden, self.lm_head.weight, labels, **reference).loss


def batch(width):
    labels = torch.randint(0, V, (4, width))
    labels[:, :2] = -100
    labels[1, 4:] = -100
    return torch.randn(4, width, D), labels, -10 * torch.ones(4)


@pytest.fixture
def counting():
    """A backend, and the lists of forward and backward graphs that it was given."""
    graphs: tuple[list, list] = ([], [])

    def keep(into):
        def compiler(graph, example_inputs):
            into.append(graph)
            return make_boxed_func(graph.forward)

        return compiler

    return aot_autograd(fw_compiler=keep(graphs[0]), bw_compiler=keep(graphs[1])), graphs


MODELS = [
    pytest.param(FusedLinearDPOLoss(beta=0.2), {}, id="dpo"),
    pytest.param(FusedLinearIPOLoss(), {"trained": ["body"]}, id="ipo-frozen-head"),
    pytest.param(FusedLinearSLiCLoss(), {"trained": ["lm_head"]}, id="slic-head-alone"),
    pytest.param(FusedLinearAPALoss(), {"online": True}, id="apa-online"),
    pytest.param(FusedLinearPairLoss("orpo", order="interleaved"), {}, id="orpo-interleaved"),
    pytest.param(FusedLinearPairLoss("aot"), {}, id="aot-coupled"),
    pytest.param(FusedLinearDPOLoss(impl="recompute"), {}, id="recompute"),
    pytest.param(FusedLinearPairLoss("simpo", use_weighting=True), {}, id="weighted"),
]


@pytest.mark.parametrize(("loss", "options"), MODELS)
def test_one_graph_then_one_for_all_other_lengths(same_compiled, counting, loss, options):
    model, (backend, graphs) = Model(loss, **options), counting
    compiled, leaves = torch.compile(model, backend=backend), list(model.parameters())
    for width, made in ((6, 1), (9, 2), (7, 2), (12, 2)):
        x = batch(width)
        same_compiled(lambda x=x: compiled(*x), lambda x=x: model(*x), leaves)
        assert [len(graphs[0]), len(graphs[1])] == [made, made]


def test_checkpointing_around_the_loss(same_compiled, counting):
    model, (backend, graphs) = Model(FusedLinearDPOLoss()), counting

    def call(*inputs):
        return checkpoint(model, *inputs, use_reentrant=False) * 2.0

    compiled = torch.compile(call, backend=backend)
    for width in (6, 9, 7):
        x = batch(width)
        same_compiled(lambda x=x: compiled(*x), lambda x=x: call(*x), list(model.parameters()))
    assert [len(graphs[0]), len(graphs[1])] == [2, 2]


def test_backward_twice(same_compiled):
    model = Model(FusedLinearDPOLoss())
    leaves = list(model.parameters())
    with torch._functorch.config.patch(donated_buffer=False):
        loss = torch.compile(model, backend="aot_eager")(*batch(6))
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


USES = [
    pytest.param(lambda logps, ref: logps.mean() + logps.std(), id="mean"),
    pytest.param(lambda logps, ref: logps.sum() / max(len(logps), 1), id="length"),
    pytest.param(lambda logps, ref: logps.sum() if logps.shape[0] > 14 else logps[0], id="branch"),
    pytest.param(lambda logps, ref: logps[0] + logps[-1] + logps[1:-1].sum(), id="index"),
    pytest.param(lambda logps, ref: (logps - ref).abs().max(), id="other-tensor"),
    pytest.param(lambda logps, ref: logps[logps < -3].sum(), id="mask"),
    pytest.param(lambda logps, ref: sum(logps.tolist()), id="list"),
    pytest.param(lambda logps, ref: logps.mul_(2).sum(), id="in-place"),
]


# PyTorch's own look at a result that goes from one graph to the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("use", USES)
def test_token_logps_of_a_result_are_an_ordinary_tensor(same_compiled, use):
    """Their number depends on the labels: what PyTorch cannot trace breaks the graph there."""
    loss, weight = FusedLinearDPOLoss(), torch.randn(V, D, requires_grad=True)

    def step(x, labels, ref, tokens):
        out = loss(x, weight, labels, ref_logps=ref)
        return out.loss, use(out.token_logps, tokens)

    compiled = torch.compile(step, backend="aot_eager", dynamic=True)
    for width in (5, 9):
        inputs = batch(width)
        tokens = torch.randn(int((inputs[1] >= 0).sum()))
        (got, seen), (wanted, expected) = compiled(*inputs, tokens), step(*inputs, tokens)
        assert torch.equal(got, wanted) and float(seen) == float(expected)
        grads = [torch.autograd.grad(value, weight)[0] for value in (got, wanted)]
        assert torch.equal(*grads)


def test_a_part_of_a_batch(same_compiled, counting):
    counts, (backend, graphs) = (3, 4, 2, 3), counting
    selection = TokenSelection(
        torch.arange(12), torch.randint(0, V, (12,)), torch.tensor(counts), counts
    )
    hidden, weight = (torch.randn(n, D, requires_grad=True) for n in (12, V))
    objective, totals = Objective.parse(["dpo", "sft"], weights=[1.0, 0.5]), BatchTotals(4, 11)

    def call():
        return pair_loss(
            hidden, LmHead(weight), selection, objective, ref_logps=torch.zeros(4), totals=totals
        ).loss

    same_compiled(torch.compile(call, backend=backend), call, [hidden, weight])
    assert [len(graphs[0]), len(graphs[1])] == [1, 1]


def test_no_token_and_one(same_compiled):
    model = Model(FusedLinearDPOLoss())
    compiled = torch.compile(model, backend="aot_eager")
    for scored in (5, 0, 1):
        x, labels, ref = batch(6)
        labels[:] = -100
        labels[0, 1 : 1 + scored] = 3
        call = (x, labels, ref)
        same_compiled(
            lambda call=call: compiled(*call), lambda call=call: model(*call),
            list(model.parameters()),
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"ref_logps": None}, r"ref_logps: expected \[4\] for dpo", id="reference"),
        pytest.param(
            {"labels": torch.full((4, 6), V)}, "expected token ids from 0 to 32, got 33", id="id"
        ),
        pytest.param({"labels": torch.ones(3, 6).long()}, "labels: expected 2B rows", id="odd"),
        pytest.param({"weight": torch.ones(V, D + 1)}, "weight: expected shape", id="weight"),
    ],
)
def test_what_is_wrong_is_named(same_compiled, backend, change, message):
    x, labels, ref = batch(6)
    call = {"weight": torch.randn(V, D), "labels": labels, "ref_logps": ref} | change
    with pytest.raises(ValueError, match=message):
        torch.compile(FusedLinearDPOLoss(), backend=backend)(x, **call)


@pytest.mark.parametrize("name", ["select_pairs", "pair_loss", "pair_loss_gradients"])
def test_operators_that_read_on_the_host_are_not_recorded_in_cuda_graphs(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fastdaa, name).default.tags


def test_a_pytorch_without_the_function_is_asked_as_its_documentation_says(monkeypatch):
    class Context:
        def new_dynamic_size(self):
            return 7

    monkeypatch.setattr(torch.library, "get_ctx", Context)
    assert compiled_sizes.size_from_data() == 7


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_llama_with_its_loss_is_one_graph(same_compiled, counting):
    transformers = pytest.importorskip("transformers")
    backend, graphs = counting
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    llama, loss = transformers.LlamaForCausalLM(config), FusedLinearDPOLoss()

    def model(ids, mask, labels):
        hidden = llama.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return loss(hidden, llama.lm_head.weight, labels, ref_logps=torch.zeros(4)).loss

    compiled = torch.compile(model, backend=backend)
    for width in (9, 12, 10):
        ids, mask = torch.randint(0, V, (4, width)), torch.ones(4, width, dtype=torch.int64)
        mask[1, -2:] = 0
        call = (ids, mask, ids.masked_fill(mask == 0, -100))
        same_compiled(
            lambda call=call: compiled(*call), lambda call=call: model(*call),
            list(llama.parameters()),
        )  # fmt: skip
    assert [len(graphs[0]), len(graphs[1])] == [2, 2]


def test_labels_may_be_selected_in_the_graph(counting):
    """By ``select_pairs`` itself, whose result ``pair_loss`` takes in the same graph."""
    backend, (forward, backward) = counting
    weight = torch.randn(V, D, requires_grad=True)

    def loss(x, labels, ref):
        selection = select_pairs(labels)
        out = pair_loss(x, LmHead(weight), selection, Objective.parse("dpo"), ref_logps=ref)
        return out.loss

    compiled = torch.compile(loss, backend=backend)
    for width in (7, 5, 6):
        x, *rest = batch(width)
        x.requires_grad_()
        want, got = (torch.autograd.grad(call(x, *rest), (x, weight)) for call in (loss, compiled))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert len(forward) == len(backward) == 2
