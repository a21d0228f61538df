"""The ``torch.nn`` doors: labels and hidden states as trainers have them."""

from __future__ import annotations

import gc
import inspect
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdaa import (
    FusedLinearAPALoss,
    FusedLinearDPOLoss,
    FusedLinearIPOLoss,
    FusedLinearPairLoss,
    FusedLinearSLiCLoss,
    custom_loss,
)
from fastdaa.losses import get_loss

B, T, D, V = 3, 7, 12, 31


class Inputs(NamedTuple):
    hidden_states: Tensor
    weight: Tensor
    labels: Tensor
    ref_hidden_states: Tensor
    ref_weight: Tensor


def inputs() -> Inputs:
    labels = torch.randint(V, (2 * B, T))
    for row, prompt in enumerate((2, 3, 1, 2, 3, 1)):
        labels[row, :prompt] = -100
    labels[1, 5:] = -100
    return Inputs(
        torch.randn(2 * B, T, D).requires_grad_(),
        torch.randn(V, D).requires_grad_(),
        labels,
        torch.randn(2 * B, T, D + 4),
        torch.randn(V, D + 4),
    )


def naive_logps(hidden_states, weight, labels) -> Tensor:
    """``[2B, T - 1]`` as TRL computes them, 0 where nothing is scored."""
    logits = (hidden_states @ weight.T)[:, :-1].float()
    shifted = labels[:, 1:]
    mask = shifted != -100
    picked = logits.log_softmax(-1).gather(-1, shifted.clamp(min=0)[..., None])[..., 0]
    return picked * mask


def interleave(values: Tensor) -> Tensor:
    return torch.stack([values[:B], values[B:]], 1).flatten(0, 1)


LOSSES = {
    "dpo": (FusedLinearDPOLoss, {"beta": 0.2}, lambda h: -F.logsigmoid(0.2 * h)),
    "ipo": (FusedLinearIPOLoss, {"beta": 0.5}, lambda h: (h - 1.0) ** 2),
    "slic": (
        FusedLinearSLiCLoss,
        {"beta": 0.3, "delta": 2.0},
        lambda h: (2.0 - 0.3 * h).clamp(min=0),
    ),
    "generic": (FusedLinearPairLoss, {"beta": 0.1}, lambda h: -F.logsigmoid(0.1 * h)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("order", ["chosen_first", "interleaved"])
def test_value_and_gradients_of_the_formula(name, order):
    cls, options, formula = LOSSES[name]
    made = inputs()
    sums = naive_logps(made.hidden_states, made.weight, made.labels).sum(1)
    ref = naive_logps(made.ref_hidden_states, made.ref_weight, made.labels).sum(1)
    ratios = sums - ref
    losses = formula(ratios[:B] - ratios[B:])
    expected = torch.autograd.grad(losses.mean(), [made.hidden_states, made.weight])

    hidden, labels, ref_hidden = made.hidden_states, made.labels, made.ref_hidden_states
    if order == "interleaved":
        hidden, labels, ref_hidden = (interleave(x) for x in (hidden, labels, ref_hidden))
    out = cls(order=order, **options)(
        hidden, made.weight, labels, ref_hidden_states=ref_hidden, ref_weight=made.ref_weight
    )
    torch.testing.assert_close(out.losses, losses.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.policy.chosen, sums[:B].detach(), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.loss, [made.hidden_states, made.weight])
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_apa_is_the_mean_over_tokens():
    made = inputs()
    out = FusedLinearAPALoss(lam=2.0)(
        made.hidden_states, made.weight, made.labels,
        ref_hidden_states=made.ref_hidden_states, ref_weight=made.ref_weight,
    )  # fmt: skip
    policy = naive_logps(made.hidden_states, made.weight, made.labels)
    ref = naive_logps(made.ref_hidden_states, made.ref_weight, made.labels)
    scored = made.labels[:, 1:] != -100
    advantage = torch.tensor([1.0] * B + [-1.0] * B)[:, None]
    error = (policy - ref - advantage / 2.0)[scored].square()
    torch.testing.assert_close(out.loss, error.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["chosen_first", "interleaved"])
@pytest.mark.parametrize("options", [{"loss": "apa"}, {"ld_alpha": 0.3}], ids=["apa", "ld-dpo"])
def test_reference_log_probs_of_tokens_are_those_of_the_hidden_states(order, options):
    made = inputs()
    at_labels = F.pad(naive_logps(made.ref_hidden_states, made.ref_weight, made.labels), (1, 0))
    at_labels[made.labels == -100] = torch.nan  # nobody reads them
    rows = [made.hidden_states, made.labels, made.ref_hidden_states, at_labels]
    if order == "interleaved":
        rows = [interleave(values) for values in rows]
    hidden, labels, ref_hidden, at_labels = rows
    loss = FusedLinearPairLoss(order=order, **options)
    scored = loss(
        hidden, made.weight, labels, ref_hidden_states=ref_hidden, ref_weight=made.ref_weight
    )
    given = loss(hidden, made.weight, labels, ref_token_logps=at_labels)
    assert scored.losses.isfinite().all()
    torch.testing.assert_close(given.losses, scored.losses, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^ref_token_logps: .* got None; ref_logps, which are s"):
        loss(hidden, made.weight, labels, ref_logps=torch.zeros(2 * B))
    with pytest.raises(
        ValueError, match=r"^ref_token_logps: expected shape \[6, 7\], got \[6, 6\]"
    ):
        loss(hidden, made.weight, labels, ref_token_logps=at_labels[:, 1:])


def test_reference_log_probs_of_tokens_in_a_graph():
    made, loss = inputs(), FusedLinearAPALoss()
    call = made.hidden_states, made.weight, made.labels
    ref = -torch.rand(2 * B, T)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)(*call, ref_token_logps=ref)
    assert torch.equal(compiled.loss, loss(*call, ref_token_logps=ref).loss)


def test_advantages_follow_the_order_of_the_rows():
    made, advantages = inputs(), torch.randn(2 * B)
    rest = {"ref_weight": made.ref_weight}
    first = FusedLinearAPALoss()(
        made.hidden_states, made.weight, made.labels, advantages=advantages,
        ref_hidden_states=made.ref_hidden_states, **rest,
    )  # fmt: skip
    second = FusedLinearAPALoss(order="interleaved")(
        interleave(made.hidden_states), made.weight, interleave(made.labels),
        advantages=interleave(advantages),
        ref_hidden_states=interleave(made.ref_hidden_states), **rest,
    )  # fmt: skip
    assert torch.equal(first.losses, second.losses)


def test_given_reference_logps_are_those_of_the_hidden_states():
    made = inputs()
    loss = FusedLinearDPOLoss()
    ref = naive_logps(made.ref_hidden_states, made.ref_weight, made.labels).sum(1)
    given = loss(made.hidden_states, made.weight, made.labels, ref_logps=ref)
    scored = loss(
        made.hidden_states, made.weight, made.labels,
        ref_hidden_states=made.ref_hidden_states, ref_weight=made.ref_weight,
    )  # fmt: skip
    torch.testing.assert_close(given.losses, scored.losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": "sorted"}, ValueError, "order: expected one of 'chosen_first', 'interleaved'"),
        ({"ignore_index": -100.5}, TypeError, "ignore_index: expected an integer, got -100.5"),
        ({"ignore_index": 5}, ValueError, "ignore_index: expected a negative number, got 5"),
        ({"impl": "fast"}, ValueError, "impl: expected one of 'auto'"),
        ({"engine": "cuda"}, ValueError, "engine: expected one of 'auto'"),
        ({"max_bytes": -1}, ValueError, "max_bytes: expected a finite number above 0, got -1"),
        ({"softcap": 0}, ValueError, "softcap: expected a finite number above 0, got 0"),
        ({"softcap": torch.tensor(3.0)}, TypeError, "softcap: expected a number, got Tensor"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
        ({"temperature": None}, TypeError, "temperature: expected a number, got NoneType"),
        ({"logit_scale": 0}, ValueError, "logit_scale: expected a number other than 0, got 0"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale: expected a finite number, got nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options_are_told_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        FusedLinearDPOLoss(**options)


def test_numbers_of_numpy_are_numbers():
    made, ref = inputs(), torch.zeros(2 * B)
    losses = [
        FusedLinearDPOLoss(logit_scale=kind(0.5), softcap=kind(4))(
            made.hidden_states, made.weight, made.labels, ref_logps=ref
        ).loss
        for kind in (float, np.float32)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("ref", "error", "message"),
    [
        ((0.0,) * 2 * B, TypeError, "ref_logps: expected a torch.Tensor, got tuple"),
        (torch.zeros(2 * B).long(), TypeError, "ref_logps: expected fp16, bf16, fp32 or fp64"),
        (torch.zeros(2 * B, device="meta"), ValueError, "ref_logps: expected device cpu, got meta"),
        (torch.zeros(B, 2), ValueError, r"ref_logps: expected shape \[6\], got \[3, 2\]"),
    ],
    ids=["tuple", "integers", "device", "shape"],
)
def test_a_wrong_reference_is_named(ref, error, message):
    made = inputs()
    with pytest.raises(error, match=message):
        FusedLinearDPOLoss()(made.hidden_states, made.weight, made.labels, ref_logps=ref)


@pytest.mark.parametrize("impl", ["single_pass", "recompute", "reference"])
def test_the_reference_is_a_constant(impl):
    made, ref = inputs(), torch.zeros(2 * B, requires_grad=True)
    FusedLinearDPOLoss(impl=impl)(
        made.hidden_states, made.weight, made.labels, ref_logps=ref
    ).loss.backward()
    assert ref.grad is None
    assert made.hidden_states.grad is not None


def test_the_default_device_is_not_where_things_are_made():
    made, ref = inputs(), torch.zeros(2 * B)
    with torch.device("meta"):
        out = FusedLinearDPOLoss()(made.hidden_states, made.weight, made.labels, ref_logps=ref)
        out.loss.backward()
    assert out.loss.device.type == made.hidden_states.grad.device.type == "cpu"


def test_the_same_model_as_its_own_reference_has_a_loss_of_exactly_ln_2():
    made = inputs()
    bias = torch.randn(V).requires_grad_()
    out = FusedLinearDPOLoss(softcap=4.0, logit_scale=0.5, temperature=1.2)(
        made.hidden_states, made.weight, made.labels,
        bias=bias, ref_hidden_states=made.hidden_states,
    )  # fmt: skip
    assert torch.equal(out.loss.detach(), torch.log(torch.tensor(2.0)))
    out.loss.backward()
    assert all(t.grad is not None for t in (made.hidden_states, made.weight, bias))


def test_losses_without_a_reference_need_none():
    made = inputs()
    out = FusedLinearPairLoss("simpo")(made.hidden_states, made.weight, made.labels)
    assert out.loss.isfinite()


def test_a_mixture_with_weights():
    made = inputs()
    ref = torch.randn(2 * B)
    both = FusedLinearPairLoss(["dpo", "sft"], weights=[1.0, 0.3], beta=0.4)
    parts = [FusedLinearPairLoss("dpo", beta=0.4), FusedLinearPairLoss("sft")]
    call = (made.hidden_states, made.weight, made.labels)
    mixed = both(*call, ref_logps=ref).loss
    dpo, sft = (part(*call, ref_logps=ref).loss for part in parts)
    torch.testing.assert_close(mixed, dpo + 0.3 * sft)


def test_max_bytes_and_impl_are_passed_on():
    made = inputs()
    call = (made.hidden_states, made.weight, made.labels)
    with pytest.raises(ValueError, match="max_bytes: expected at least 124"):
        FusedLinearDPOLoss(max_bytes=100)(*call, ref_logps=torch.zeros(2 * B))
    with pytest.raises(ValueError, match="max_bytes: expected at least 124"):
        FusedLinearDPOLoss(max_bytes=100)(*call, ref_hidden_states=made.hidden_states)
    with pytest.raises(ValueError, match="impl='frozen'"):
        FusedLinearDPOLoss(impl="frozen")(*call, ref_logps=torch.zeros(2 * B))


def test_the_module_shows_its_objective_and_has_no_parameters():
    module = FusedLinearIPOLoss(beta=0.25)
    assert "ipo" in repr(module) and "beta=0.25" in repr(module)
    assert list(module.parameters()) == [] and module.state_dict() == {}


def test_ignore_index():
    made = inputs()
    labels = made.labels.where(made.labels != -100, -1)
    call = made.hidden_states, made.weight
    ref = torch.zeros(2 * B)
    expected = FusedLinearDPOLoss()(*call, made.labels, ref_logps=ref)
    got = FusedLinearDPOLoss(ignore_index=-1)(*call, labels, ref_logps=ref)
    assert torch.equal(got.losses, expected.losses)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({}, r"ref_logps: expected \[6\] for dpo.*, got None", id="no-reference"),
        pytest.param(
            {"ref_logps": torch.zeros(B)}, r"ref_logps: expected shape \[6\], got \[3\]",
            id="ref-logps",
        ),
        pytest.param(
            {"ref_logps": torch.zeros(2, B)}, r"ref_logps: expected shape \[6\], got \[2, 3\]",
            id="ref-logps-2d",
        ),
        pytest.param(
            {"ref_logps": torch.zeros(2 * B), "ref_hidden_states": torch.zeros(2 * B, T, D)},
            "ref_logps: expected None beside ref_hidden_states, got both", id="both",
        ),
        pytest.param(
            {"ref_hidden_states": torch.zeros(2 * B, T, D), "ref_bias": torch.zeros(V)},
            "ref_bias: expected None without ref_weight", id="bias-alone",
        ),
        pytest.param(
            {"ref_hidden_states": torch.zeros(2 * B, T, D + 1)},
            r"weight: expected shape \[V, D\] with D = 13", id="ref-width",
        ),
        pytest.param(
            {"ref_hidden_states": torch.zeros(2 * B, T - 1, D)},
            r"ref_hidden_states: expected shape \[6, 7, D\], got \[6, 6, 12\]", id="ref-length",
        ),
        pytest.param(
            {"labels": torch.zeros(2 * B, T - 1).long()},
            r"hidden_states: expected shape \[6, 6, D\], got \[6, 7, 12\]", id="shifted-labels",
        ),
        pytest.param(
            {"labels": torch.zeros(5, T).long()}, "expected 2B rows .* got 5", id="odd",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(change, message):
    made = inputs()
    call = {"hidden_states": made.hidden_states, "weight": made.weight, "labels": made.labels}
    with pytest.raises(ValueError, match=message):
        FusedLinearDPOLoss()(**{**call, **change})


def test_a_hyperparameter_that_the_loss_does_not_have():
    with pytest.raises(TypeError, match="delta"):
        FusedLinearDPOLoss(delta=1.0)
    with pytest.raises(ValueError, match="delta"):
        FusedLinearPairLoss("dpo", delta=1.0)


NAMED = {
    "dpo": FusedLinearDPOLoss,
    "ipo": FusedLinearIPOLoss,
    "slic": FusedLinearSLiCLoss,
    "apa": FusedLinearAPALoss,
}


@pytest.mark.parametrize("loss", NAMED)
def test_signatures_are_those_of_the_registry_and_of_the_general_module(loss):
    """What ``help()`` and editors show: real keywords, with the defaults of the loss itself."""
    own = inspect.signature(NAMED[loss]).parameters
    assert all(p.kind is p.KEYWORD_ONLY and p.annotation is not p.empty for p in own.values())
    general = inspect.signature(FusedLinearPairLoss).parameters
    shared = {
        name: p.default
        for name, p in general.items()
        if p.kind is p.KEYWORD_ONLY and name != "weights"
    }
    assert {name: p.default for name, p in own.items()} == {
        **get_loss(loss).hyperparameters, **shared,
    }  # fmt: skip
    documented = inspect.getdoc(NAMED[loss])
    assert all(name in documented for name in own)


@pytest.mark.parametrize("loss", NAMED)
def test_every_option_of_a_named_loss_arrives(loss):
    values = {"beta": 0.25, "label_smoothing": 0.125, "length_alpha": 0.5, "length_norm": True,
              "target": "unified", "delta": 2.0, "lam": 3.0}  # fmt: skip
    values = {name: values[name] for name in get_loss(loss).hyperparameters}
    shared = {"softcap": 5.0, "logit_scale": 0.5, "temperature": 2.0, "order": "interleaved",
              "ignore_index": -1, "impl": "recompute", "engine": "torch",
              "max_bytes": 10**9}  # fmt: skip
    named, general = NAMED[loss](**values, **shared), FusedLinearPairLoss(loss, **values, **shared)
    assert str(named.objective) == str(general.objective)
    kept = ("head_options", "order", "ignore_index", "impl", "engine", "max_bytes")
    assert [getattr(named, name) for name in kept] == [getattr(general, name) for name in kept]


def test_dpo_at_zero_margin_is_ln_2_for_any_beta():
    made = inputs()
    call = (made.hidden_states, made.weight, made.labels)
    logps = FusedLinearDPOLoss()(*call, ref_logps=torch.zeros(2 * B)).policy
    ref = torch.cat([logps.chosen, logps.rejected])
    out = FusedLinearDPOLoss(beta=7.0)(*call, ref_logps=ref)
    assert out.loss.item() == pytest.approx(math.log(2.0), abs=1e-7)


def with_a_detached_factor(policy, ref):
    margin = policy.chosen - policy.rejected - ref.chosen + ref.rejected
    return margin * torch.sigmoid(margin).detach()


@pytest.mark.parametrize(
    "module",
    [
        FusedLinearAPALoss(),
        FusedLinearPairLoss("dpo", ld_alpha=0.5),
        FusedLinearPairLoss("dpo", use_weighting=True),
        FusedLinearPairLoss(custom_loss(with_a_detached_factor, coupled=False)),
    ],
    ids=["apa", "ld-alpha", "weighting", "detached"],
)
def test_no_step_leaves_a_tensor_behind(module):
    """Parts of the objective's graph that the loss does not reach are freed, too."""
    made = inputs()

    def step():
        leaves = [
            made.hidden_states.detach().requires_grad_(),
            made.weight.detach().requires_grad_(),
        ]
        ref = torch.full(made.labels.shape, -3.0)
        module(*leaves, made.labels, ref_token_logps=ref).loss.backward()

    def alive():
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    step()
    before = alive()
    for _ in range(4):
        step()
    assert alive() == before
