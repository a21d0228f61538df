"""In somebody's training loop: checkpointing, sharding, in-place changes, wrong arguments."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastdaa import (
    LOSSES,
    BatchTotals,
    FusedLinearDPOLoss,
    FusedLinearPairLoss,
    LmHead,
    Objective,
    custom_loss,
    pair_loss,
    select_pairs,
    token_divergence,
    token_entropy,
)
from fastdaa.drop_in.liger import LigerFusedLinearCPOLoss

B, T, D, V = 3, 7, 16, 41
LABELS = torch.randint(V, (2 * B, T), generator=torch.Generator().manual_seed(0))
LABELS[:, :2] = -100
REF = torch.linspace(-20, -10, 2 * B)


def leaves(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in ((2 * B, T, D), (V, D))
    ]


def formula(hidden, weight, scale=0.1):
    """DPO on materialised logits."""
    targets = LABELS[:, 1:]
    logps = (hidden[:, :-1] @ weight.T).log_softmax(dim=-1)
    logps = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    ratios = logps.sum(dim=1) - REF
    return -F.logsigmoid(scale * (ratios[:B] - ratios[B:])).mean()


def gradients(loss, tensors):
    return torch.autograd.grad(loss(*tensors), tensors)


def flop_of(call):
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


@pytest.mark.parametrize("losses", ["dpo", "mixture", "own"])
def test_checkpointing_computes_the_head_once_in_forward(losses):
    """The objective's own little graph is none of the checkpoint's business."""
    own = custom_loss(
        lambda policy, ref, *, beta=0.1: F.softplus(-beta * (policy.chosen - policy.rejected)),
        name="pairs", needs_ref=False, coupled=False,
    )  # fmt: skip
    names = {"dpo": ["dpo"], "mixture": ["ipo", "sft"], "own": [own]}[losses]
    module, tensors = FusedLinearPairLoss(names), leaves()

    def call(hidden, weight):
        return module(hidden, weight, LABELS, ref_logps=REF.double()).loss

    plain, flop = flop_of(lambda: call(*tensors))
    expected = torch.autograd.grad(plain, tensors)
    loss, with_checkpoint = flop_of(lambda: checkpoint(call, *tensors, use_reentrant=False))
    assert with_checkpoint == flop > 0
    assert torch.equal(loss, plain)
    for gradient, wanted in zip(torch.autograd.grad(loss, tensors), expected, strict=True):
        assert torch.equal(gradient, wanted)


def test_hooks_see_what_waits_for_backward_and_nothing_else():
    packed = []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        FusedLinearDPOLoss()(*leaves(), LABELS, ref_logps=REF.double())
    rows = int((LABELS != -100).sum())
    # Where the rows are, and two gradients with a scale for every row.
    assert sorted(packed) == [(rows,), (rows,), (rows, D), (V,), (V, D)]


def test_hooks_may_be_disabled():
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        loss = FusedLinearDPOLoss()(*leaves(), LABELS, ref_logps=REF.double()).loss
    torch.testing.assert_close(loss, formula(*leaves()), rtol=1e-12, atol=0.0)


class TestLearnedScale:
    """A function of the caller's that reads a parameter of its own."""

    scale = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def own(self, policy, ref):
        ratios = policy.chosen - ref.chosen - policy.rejected + ref.rejected
        return -F.logsigmoid(self.scale * ratios)

    def call(self, hidden, weight, compiled=False, **options):
        loss = FusedLinearPairLoss(custom_loss(self.own, name="own", coupled=False), **options)
        if compiled:
            loss = torch.compile(loss, backend="eager", fullgraph=True)
        return loss(hidden, weight, LABELS, ref_logps=REF.double()).loss

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_is_refused_where_its_gradient_would_be_lost(self, compiled):
        with pytest.raises(ValueError, match=r"another tensor that .* float64\[\]; detach it"):
            self.call(*leaves(), compiled=compiled)

    @pytest.mark.parametrize("impl", ["recompute", "reference"])
    def test_has_a_gradient_outside_the_head(self, impl):
        tensors = [*leaves(), self.scale]
        got = torch.autograd.grad(self.call(*tensors[:2], impl=impl), tensors)
        for gradient, wanted in zip(got, gradients(formula, tensors), strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)

    def test_is_a_constant_without_gradients(self):
        with torch.no_grad():
            expected = formula(*leaves(), self.scale)
            torch.testing.assert_close(self.call(*leaves()), expected, rtol=1e-12, atol=0.0)

    def test_detached_it_is_a_number(self, monkeypatch):
        monkeypatch.setattr(type(self), "scale", self.scale.detach())
        tensors = leaves()
        for gradient, wanted in zip(
            gradients(self.call, tensors), gradients(formula, tensors), strict=True
        ):
            torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_entropies_may_be_changed_in_place(trained):
    hidden, weight = torch.randn(5, D, requires_grad=True), torch.randn(V, D)
    weight.requires_grad_(trained)
    (expected,) = torch.autograd.grad((0.5 * token_entropy(hidden, weight)).sum(), hidden)
    entropies = token_entropy(hidden, weight)
    entropies *= 0.5
    (gradient,) = torch.autograd.grad(entropies.sum(), hidden)
    assert torch.equal(gradient, expected)


@pytest.fixture
def one_process():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Policy(nn.Module):
    """A backbone, a head, and a forward that computes the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, inputs, unshard=False):
        if unshard:
            self.head.unshard()
        return FusedLinearDPOLoss()(
            self.backbone(inputs), self.head.weight, LABELS, ref_logps=REF
        ).loss


class TestFsdp:
    """``fully_shard`` of PyTorch."""

    @pytest.mark.parametrize("alone", [False, True], ids=["head-in-root", "head-unsharded"])
    def test_gradients_are_those_of_the_whole_module(self, one_process, alone):
        inputs = torch.randn(2 * B, T, D, generator=torch.Generator().manual_seed(4))
        whole, policy = Policy(), Policy()
        whole(inputs).backward()
        if alone:
            fully_shard(policy.head, mesh=one_process)
        fully_shard(policy, mesh=one_process)(inputs, unshard=alone).backward()
        for parameter, wanted in zip(policy.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), wanted.grad)

    def test_a_sharded_weight_is_named(self, one_process):
        policy = Policy()
        fully_shard(policy.head, mesh=one_process)
        with pytest.raises(TypeError, match=r"^weight: expected .* its entries, got DTensor"):
            policy(torch.randn(2 * B, T, D))
        with pytest.raises(TypeError, match=r"^weight: .*got DTensor"):
            token_entropy(torch.randn(4, D), policy.head.weight)


@pytest.mark.parametrize("name", ["hidden_states", "labels", "bias", "ref_logps"])
def test_other_distributed_tensors_are_refused_by_name(one_process, name):
    tensors = {
        "hidden_states": torch.randn(2 * B, T, D), "weight": torch.randn(V, D), "labels": LABELS,
        "bias": torch.zeros(V), "ref_logps": REF,
    }  # fmt: skip
    tensors[name] = distribute_tensor(tensors[name], one_process, [Replicate()])
    with pytest.raises(TypeError, match=rf"^{name}: expected .* its entries, got DTensor"):
        FusedLinearDPOLoss()(**tensors)
    tensors[name] = tensors[name].full_tensor()
    FusedLinearDPOLoss()(**tensors)


HIDDEN, WEIGHT = torch.randn(2 * B, T, D), torch.randn(V, D)
DPO = Objective.parse("dpo")


def pair(**options):
    return pair_loss(HIDDEN, LmHead(WEIGHT), select_pairs(LABELS), DPO, ref_logps=REF, **options)


CALLS = {
    "labels-on-meta": (
        lambda: FusedLinearDPOLoss()(HIDDEN, WEIGHT, LABELS.to("meta"), ref_logps=REF),
        ValueError, r"^labels: expected a device that holds values, got meta",
    ),
    "liger-target-on-meta": (
        lambda: LigerFusedLinearCPOLoss()(WEIGHT, HIDDEN, LABELS.to("meta")),
        ValueError, r"^target: expected a device that holds values, got meta",
    ),
    "no-hidden-states": (
        lambda: FusedLinearDPOLoss()(None, WEIGHT, LABELS, ref_logps=REF),
        TypeError, r"^hidden_states: expected a torch.Tensor, got NoneType",
    ),
    "reference-of-another-width": (
        lambda: FusedLinearDPOLoss()(
            HIDDEN, WEIGHT, LABELS, ref_hidden_states=torch.randn(2 * B, T, D + 1)
        ),
        ValueError, r"^ref_weight: .* D = 17 as in ref_hidden_states",
    ),
    "weight-for-a-head": (
        lambda: pair_loss(HIDDEN, WEIGHT, select_pairs(LABELS), DPO, ref_logps=REF),
        TypeError, r"^head: expected a LmHead, as of LmHead\(weight\), got Tensor",
    ),
    "labels-for-a-selection": (
        lambda: pair_loss(HIDDEN, LmHead(WEIGHT), LABELS, DPO, ref_logps=REF),
        TypeError, r"^selection: expected a TokenSelection, as of select_pairs",
    ),
    "name-for-an-objective": (
        lambda: pair_loss(HIDDEN, LmHead(WEIGHT), select_pairs(LABELS), "dpo", ref_logps=REF),
        TypeError, r"^objective: .*Objective.parse\('dpo'\), got str",
    ),
    "nothing-for-an-objective": (
        lambda: pair_loss(HIDDEN, LmHead(WEIGHT), select_pairs(LABELS), None, ref_logps=REF),
        TypeError, r"^objective: expected an Objective, as of Objective.parse\('dpo'\), got NoneT",
    ),
    "loss-for-an-objective": (
        lambda: pair_loss(
            HIDDEN, LmHead(WEIGHT), select_pairs(LABELS), LOSSES["ipo"], ref_logps=REF
        ),
        TypeError, r"^objective: expected an Objective, .* got Loss",
    ),
    "module-for-an-objective": (
        lambda: pair_loss(
            HIDDEN, LmHead(WEIGHT), select_pairs(LABELS), FusedLinearDPOLoss(), ref_logps=REF
        ),
        TypeError, r"^objective: expected an Objective, .* got FusedLinearDPOLoss",
    ),
    "hidden-states-of-no-dimension": (
        lambda: FusedLinearDPOLoss()(torch.tensor(1.0), WEIGHT, LABELS, ref_logps=REF),
        ValueError, r"^hidden_states: expected shape \[6, 7, D\], got \[\]",
    ),
    "one-number-for-hidden-states": (
        lambda: pair_loss(
            torch.tensor(1.0), LmHead(WEIGHT), select_pairs(LABELS), DPO, ref_logps=REF
        ),
        ValueError, r"^hidden_states: expected shape \[\.\.\., D\], got \[\]",
    ),
    "sparse-weight": (
        lambda: FusedLinearDPOLoss()(HIDDEN, WEIGHT.to_sparse(), LABELS, ref_logps=REF),
        TypeError, r"^weight: expected a dense tensor, got layout torch.sparse_coo",
    ),
    "nested-hidden-states": (
        lambda: FusedLinearDPOLoss()(
            torch.nested.nested_tensor(list(HIDDEN), layout=torch.jagged), WEIGHT, LABELS,
            ref_logps=REF,
        ),
        TypeError, r"^hidden_states: expected a dense tensor, got a nested tensor",
    ),
    "lengths-elsewhere": (
        lambda: pair(completion_lengths=torch.ones(2 * B, dtype=torch.int64, device="meta")),
        ValueError, r"^completion_lengths: expected device cpu, got meta",
    ),
    "totals-without-a-name": (
        lambda: pair(totals=(3, 12)), TypeError, r"^totals: expected a BatchTotals, .* got tuple",
    ),
    "a-batch-of-no-pair": (
        lambda: pair(totals=BatchTotals(0, 12)), ValueError,
        r"^totals.pairs: expected 1 or more, got 0",
    ),
    "a-negative-divisor": (
        lambda: pair(completion_lengths=-torch.ones(2 * B, dtype=torch.int64)), ValueError,
        r"^completion_lengths: expected 0 or more, got -1",
    ),
    "divergence-of-weights": (
        lambda: token_divergence(HIDDEN[0], LmHead(WEIGHT), HIDDEN[0], WEIGHT),
        TypeError, r"^ref_head: expected a LmHead",
    ),
    "weights-in-a-dictionary-of-losses": (
        lambda: FusedLinearPairLoss({"dpo": 1.0, "sft": 0.1}),
        TypeError, r"^losses: expected names .* got dict; weights are given by weights=\[",
    ),
    "function-for-a-loss": (
        lambda: FusedLinearPairLoss(lambda policy, ref: policy.chosen),
        TypeError, r"^losses: expected names or custom_loss\(\.\.\.\), got function",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
