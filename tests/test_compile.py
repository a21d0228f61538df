"""Models under ``torch.compile``: no graph break, the same bits as without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdaa import FusedLinearDPOLoss, FusedLinearPairLoss, LmHead, token_logps, token_stats

N, D, V = 12, 8, 33


def tensors(dtype=torch.float32, trained=True, bias=False):
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_(trained)
    return hidden, weight, torch.randn(V).to(dtype).requires_grad_(trained) if bias else None


LOGPS_CASES = [
    pytest.param({}, {}, id="recompute"),
    pytest.param({"trained": False}, {}, id="frozen"),
    pytest.param({"trained": False}, {"impl": "recompute"}, id="frozen-recompute"),
    pytest.param({"bias": True}, {"softcap": 3.0, "temperature": 0.7}, id="options"),
    pytest.param({"dtype": torch.bfloat16}, {}, id="bf16"),
    # What a frozen head keeps takes 384 bytes.
    pytest.param({"trained": False}, {"max_bytes": 500}, id="frozen-fits"),
    pytest.param({"trained": False}, {"max_bytes": 300}, id="frozen-does-not-fit"),
    pytest.param({"dtype": torch.bfloat16}, {"max_bytes": 300}, id="two-sweeps"),
]


@pytest.mark.parametrize(("made", "options"), LOGPS_CASES)
def test_token_logps_are_one_node(same_compiled, made, options):
    hidden, weight, bias = leaves = tensors(**made)
    targets = torch.randint(0, V, (N,))

    def loss():
        return token_logps(torch.tanh(hidden), weight, targets, bias=bias, **options).sin().sum()

    same_compiled(torch.compile(loss, backend="aot_eager", fullgraph=True), loss, leaves)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_result_may_be_changed_in_place(same_compiled, backend):
    hidden, weight, _ = leaves = tensors()
    targets = torch.randint(0, V, (N,))

    def loss():
        return token_logps(hidden, weight, targets).mul_(0.5).sum()

    same_compiled(torch.compile(loss, backend=backend, fullgraph=True), loss, leaves)


def test_token_stats_are_one_node(same_compiled):
    hidden, weight, bias = tensors(bias=True)
    targets = torch.randint(0, V, (N,))

    def statistics():
        logps, stats = token_stats(torch.tanh(hidden), LmHead(weight, bias, 3.0), targets)
        assert not any(t.requires_grad for t in (logps, *stats))
        return torch.stack([logps, *stats])

    same_compiled(torch.compile(statistics, backend="aot_eager", fullgraph=True), statistics, [])


class Model(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.body, self.lm_head, self.loss = nn.Linear(D, D), nn.Linear(D, V, bias=False), loss

    def forward(self, x, labels, reference):
        hidden = torch.tanh(self.body(x))
        return self.loss(hidden, self.lm_head.weight, labels, **reference).loss


def batch(width, online):
    labels = torch.randint(0, V, (4, width))
    labels[:, :2] = -100
    labels[1, 4:] = -100
    x = torch.randn(4, width, D)
    return x, labels, {"ref_hidden_states": x} if online else {"ref_logps": -10 * torch.ones(4)}


@pytest.mark.parametrize(
    ("loss", "online"),
    [(FusedLinearDPOLoss(beta=0.2), False), (FusedLinearPairLoss("apa"), True)],
    ids=["dpo", "apa"],
)
def test_a_model_with_a_loss_module_compiles_once_for_all_lengths(same_compiled, loss, online):
    model = Model(loss)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for width in (6, 9, 7):
        inputs = batch(width, online)
        same_compiled(
            lambda x=inputs: compiled(*x), lambda x=inputs: model(*x), list(model.parameters())
        )
    assert len(graphs) == 1


def test_another_objective_is_not_served_from_the_old_graph(same_compiled):
    _, weight, _ = tensors()
    x, labels, ref = torch.randn(4, 3, D), torch.randint(0, V, (4, 3)), -10 * torch.ones(4)
    values = []
    for beta in (0.1, 0.9):
        module = FusedLinearDPOLoss(beta=beta)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        out = compiled(x, weight, labels, ref_logps=ref)
        assert torch.equal(out.loss, module(x, weight, labels, ref_logps=ref).loss)
        values.append(out.loss.item())
    assert values[0] != values[1]


def test_bad_input_is_named_when_the_graph_runs(same_compiled):
    module = torch.compile(FusedLinearDPOLoss(), backend="eager", fullgraph=True)
    _, weight, _ = tensors()
    with pytest.raises(Exception, match=r"ref_logps: expected"):
        module(torch.randn(4, 3, D), weight, torch.randint(0, V, (4, 3)))


@pytest.mark.parametrize("call", [token_logps, lambda h, w, t: token_stats(h, LmHead(w), t)[0]])
def test_wrong_token_ids_are_named_when_the_graph_runs(same_compiled, call):
    hidden, weight, _ = tensors(trained=False)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="targets: expected token ids from 0 to 32, got 33"):
        compiled(hidden.detach(), weight, torch.full((N,), V))


def test_operators_pass_the_library_check():
    """torch.library.opcheck: schema, fake implementation, autograd registration."""
    hidden, weight, bias = tensors(bias=True)
    targets = torch.randint(0, V, (N,))
    options = (3.0, 0.5, 1.0, None, None, torch.float32, "auto", "auto", None, False)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for trained, *grads in ((True, True, True), (False, True, False), (False, False, False)):
        head = [t if trained else t.detach() for t in (weight, bias)]
        torch.library.opcheck(
            torch.ops.fastdaa.head_logps.default,
            (hidden, *head, targets, *options, *grads), test_utils=checks,
        )  # fmt: skip
    with torch.no_grad():
        state = torch.ops.fastdaa.head_logps(hidden, weight, bias, targets, *options, True, True)
        torch.library.opcheck(
            torch.ops.fastdaa.head_gradients.default,
            (torch.randn(N), hidden, weight, bias, targets, *state, *options,
             [True, False, True]),
            test_utils=checks[:2],
        )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fastdaa.token_stats.default,
        (hidden.detach(), weight.detach(), bias.detach(), targets, *options[:6], "auto", None),
        test_utils=checks[:2],
    )  # fmt: skip
    labels = torch.tensor([[1, 2, -100], [3, 4, 5]])
    torch.library.opcheck(
        torch.ops.fastdaa.select_pairs.default,
        (labels, "interleaved", -100, 1),
        test_utils=checks[:2],
    )
