"""Models under ``torch.compile``: no graph break, the same bits as without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdaa import FusedLinearDPOLoss, FusedLinearPairLoss, LmHead, Objective, token_logps
from fastdaa.outputs import TokenSelection
from fastdaa.pair_loss import pair_loss

N, D, V = 12, 8, 33
LENGTHS = (3, 4, 2, 3)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(dtype=torch.float32, trained=True, bias=False):
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_(trained)
    return hidden, weight, torch.randn(V).to(dtype).requires_grad_(trained) if bias else None


def gradients(value, leaves):
    value.backward()
    grads = [t.grad for t in leaves if t is not None and t.requires_grad]
    for t in leaves:
        if t is not None:
            t.grad = None
    return grads


def same(compiled, eager, leaves):
    """Values and gradients, bit for bit."""
    got, want = compiled(), eager()
    assert torch.equal(got.detach(), want.detach())
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


LOGPS_CASES = [
    pytest.param({}, {}, id="recompute"),
    pytest.param({"trained": False}, {}, id="frozen"),
    pytest.param({"trained": False}, {"impl": "recompute"}, id="frozen-recompute"),
    pytest.param({"bias": True}, {"softcap": 3.0, "temperature": 0.7}, id="options"),
    pytest.param({"dtype": torch.bfloat16}, {}, id="bf16"),
]


@pytest.mark.parametrize(("made", "options"), LOGPS_CASES)
def test_token_logps_are_one_node(made, options):
    hidden, weight, bias = leaves = tensors(**made)
    targets = torch.randint(0, V, (N,))

    def loss():
        return token_logps(torch.tanh(hidden), weight, targets, bias=bias, **options).sin().sum()

    same(torch.compile(loss, backend="aot_eager", fullgraph=True), loss, leaves)


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "slic", "apa", "aot"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_pair_loss_is_one_node(loss_type, trained):
    hidden, weight, _ = leaves = tensors(trained=trained)
    targets, rows, lengths = torch.randint(0, V, (N,)), torch.arange(N), torch.tensor(LENGTHS)
    objective, ref = Objective.parse(loss_type), -4 * torch.ones(N)

    def loss():
        # A power of two below: paths multiply by it at different places.
        out = pair_loss(
            torch.tanh(hidden)[None], LmHead(weight),
            TokenSelection(rows, targets, lengths, LENGTHS), objective,
            ref_token_logps=ref, stats=True,
        )  # fmt: skip
        assert out.stats is not None
        return out.loss * 2.0 + out.stats.entropy.sum() * 0.0 + out.losses.sum() * 0.0

    same(torch.compile(loss, backend="aot_eager", fullgraph=True), loss, leaves)


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
def test_a_model_with_a_loss_module_compiles_once_for_all_lengths(loss, online):
    model = Model(loss)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for width in (6, 9, 7):
        inputs = batch(width, online)
        same(lambda x=inputs: compiled(*x), lambda x=inputs: model(*x), list(model.parameters()))
    assert len(graphs) == 1


def test_another_objective_is_not_served_from_the_old_graph():
    _, weight, _ = tensors()
    inputs = torch.randn(4, 3, D), torch.randint(0, V, (4, 3)), -10 * torch.ones(4)
    values = []
    for beta in (0.1, 0.9):
        module = FusedLinearDPOLoss(beta=beta)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        out = compiled(inputs[0], weight, inputs[1], ref_logps=inputs[2])
        assert torch.equal(out.loss, module(inputs[0], weight, inputs[1], ref_logps=inputs[2]).loss)
        values.append(out.loss.item())
    assert values[0] != values[1]


def test_bad_input_is_named_when_the_graph_runs():
    module = torch.compile(FusedLinearDPOLoss(), backend="eager", fullgraph=True)
    _, weight, _ = tensors()
    with pytest.raises(Exception, match=r"ref_logps: expected"):
        module(torch.randn(4, 3, D), weight, torch.randint(0, V, (4, 3)))


def test_operators_pass_the_library_check():
    """torch.library.opcheck: schema, fake implementation, autograd registration."""
    hidden, weight, bias = tensors(bias=True)
    targets = torch.randint(0, V, (N,))
    options = (3.0, 0.5, 1.0, torch.float32, "auto", "auto", None)
    for grads in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(
            torch.ops.fastdaa.head_logps.default,
            (hidden, weight.detach() if not grads[1] else weight,
             bias.detach() if not grads[1] else bias, targets, *options, *grads),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fastdaa.pair_loss.default,
        (hidden, weight, bias, targets, torch.tensor(LENGTHS), -9 * torch.ones(4), None, None,
         None, Objective.parse("dpo").key, None, None, *options, True, [True, True, True]),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
