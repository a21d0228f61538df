"""The gate: the oracle is right, what is wrong turns red, and what is only rounded passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdaa.benchmarks.cases import LOSSES, Case
from fastdaa.benchmarks.contenders import ALL, Outputs
from fastdaa.benchmarks.gate import Gate
from fastdaa.benchmarks.inputs import HeadInputs, make_inputs
from fastdaa.benchmarks.oracle import find_truth

CASE = Case("tiny", 64)
CASES = [
    CASE,
    Case("tiny-softcap", 64),
    Case("tiny", 64, "ce"),
    Case("tiny", 64, "score"),
    Case("tiny", 64, head_grad=False),
    *(Case("tiny", 64, loss, lengths="spread") for loss in LOSSES),
    Case("tiny", 64, "dpo", reference="online"),
    Case("tiny", 64, distribution="flat"),
]


def by_id(case: Case) -> str:
    return case.id


def autograd_in_fp64(inputs: HeadInputs) -> Outputs:
    """The case once more, by autograd through fp64 logits and formulas written out here."""
    case = inputs.case
    hidden = inputs.hidden.detach().double().requires_grad_()
    weight = inputs.weight.detach().double().requires_grad_(case.head_grad)
    z = hidden @ weight.T
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    logps = torch.log_softmax(z, dim=1)[torch.arange(case.tokens), inputs.targets]
    if case.work == "logps":
        value, loss = (logps * inputs.cotangent.double()).sum(), None
    elif case.work in ("ce", "score"):
        value = loss = -logps.mean()
    else:
        assert inputs.ref_logps is not None
        value = loss = _loss(case.work, logps - inputs.ref_logps.double(), inputs.counts)
    grads = torch.autograd.grad(value, (hidden, weight) if case.head_grad else (hidden,))
    dw = grads[1] if len(grads) > 1 else None
    return Outputs(loss, logps.detach(), grads[0], dw)


def _loss(name: str, ratios: Tensor, counts: tuple[int, ...]) -> Tensor:
    parts = ratios.split(counts)
    pairs = list(zip(parts[0::2], parts[1::2], strict=True))
    if name == "apa":
        signed = [((c - 1) ** 2).sum() + ((r + 1) ** 2).sum() for c, r in pairs]
        return torch.stack(signed).sum() / ratios.numel()
    h = torch.stack([chosen.sum() - rejected.sum() for chosen, rejected in pairs])
    if name == "dpo":
        return torch.log1p(torch.exp(-0.1 * h)).mean()
    if name == "ipo":
        return ((h - 5) ** 2).mean()
    return torch.clamp(1 - 0.1 * h, min=0).mean()


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_the_oracle_is_autograd_in_fp64(case: Case) -> None:
    inputs = make_inputs(case)
    truth, right = find_truth(inputs), autograd_in_fp64(inputs)
    answer, probes = truth.answer, truth.probes
    torch.testing.assert_close(answer.logps, right.logps, rtol=1e-11, atol=1e-11)
    if case.work not in ("logps", "score"):
        torch.testing.assert_close(answer.loss, right.loss, rtol=1e-11, atol=1e-11)
    if case.wants_grad:
        assert right.dh is not None
        torch.testing.assert_close(answer.dh, right.dh @ probes, rtol=1e-9, atol=1e-12)
    if case.wants_head_grad:
        assert right.dw is not None
        torch.testing.assert_close(answer.dw, right.dw @ probes, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_what_is_right_passes(case: Case) -> None:
    inputs = make_inputs(case)
    right = autograd_in_fp64(inputs)
    verdict = Gate(inputs).check(right)
    assert verdict.status == "ok", verdict.reason
    assert verdict.errors["logps"] < 1e-9


def test_stated_entropy() -> None:
    flat, peaked = (
        Gate(make_inputs(Case("small", 64, "score", distribution=d))).entropy
        for d in ("flat", "peaked")
    )
    assert 9.5 < flat < torch.log(torch.tensor(32000.0))
    assert 0.5 < peaked < 3


def _scaled_dw(right: Outputs) -> Outputs:
    return right._replace(dw=1.02 * right.dw)


def _one_row_of_dw(right: Outputs) -> Outputs:
    dw = right.dw.clone()
    dw[-1] = dw.norm(dim=1).mean()
    return right._replace(dw=dw)


def _one_entry_of_dw(right: Outputs) -> Outputs:
    dw = right.dw.clone()
    dw[17, 3] += dw.abs().max()
    return right._replace(dw=dw)


def _missing_last_token(right: Outputs) -> Outputs:
    dh = right.dh.clone()
    dh[-1] = 0
    return right._replace(dh=dh)


def _one_logp(right: Outputs) -> Outputs:
    logps = right.logps.clone()
    logps[5] += 1e-3
    return right._replace(logps=logps)


def _nan(name: str) -> Callable[[Outputs], Outputs]:
    def broken(right: Outputs) -> Outputs:
        value = getattr(right, name).clone()
        value.view(-1)[-1] = float("nan")
        return right._replace(**{name: value})

    return broken


BREAKS: dict[str, Callable[[Outputs], Outputs]] = {
    "dw: error": _scaled_dw,
    "dw_row: error": _one_row_of_dw,
    "dw: error 0": _one_entry_of_dw,
    "dh: error": _missing_last_token,
    "logps: error": _one_logp,
    "logps: error nan": _nan("logps"),
    "dh: error nan": _nan("dh"),
    "dw: error nan": _nan("dw"),
    "dw: expected [1009, 64], got nothing": lambda right: right._replace(dw=None),
    "dh: expected [64, 64], got [64, 63]": lambda right: right._replace(dh=right.dh[:, 1:]),
}


@pytest.mark.parametrize("reason", BREAKS)
def test_the_gate_turns_red(reason: str) -> None:
    inputs = make_inputs(CASE)
    right = autograd_in_fp64(inputs)
    verdict = Gate(inputs).check(BREAKS[reason](right))
    assert verdict.status == "wrong"
    assert verdict.reason is not None
    assert verdict.reason.split(":")[0].split("_")[0] == reason.split(":")[0].split("_")[0]
    assert reason.split(": ")[1].split(" 0")[0] in verdict.reason


@pytest.mark.parametrize("loss", LOSSES)
def test_a_wrong_loss_is_red(loss: str) -> None:
    inputs = make_inputs(Case("tiny", 64, loss))
    right = autograd_in_fp64(inputs)
    assert right.loss is not None
    verdict = Gate(inputs).check(right._replace(loss=right.loss * 1.01))
    assert verdict.status == "wrong" and str(verdict.reason).startswith("loss")


def test_a_gradient_where_none_is_right() -> None:
    """SLiC on pairs whose margins are all beyond the hinge."""
    inputs = make_inputs(Case("tiny", 64, "slic"))
    assert inputs.ref_logps is not None
    ends = torch.tensor(inputs.counts).cumsum(0).tolist()
    for sequence, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        inputs.ref_logps[start:end] += 10.0 if sequence % 2 else -10.0
    gate, zero = Gate(inputs), torch.zeros(64, 64)
    right = Outputs(torch.tensor(0.0), None, zero, torch.zeros(1009, 64))
    assert gate.check(right).status == "ok"
    assert gate.check(right._replace(dh=zero + 1e-3)).status == "wrong"


def test_the_largest_sum_of_a_sequence_is_an_error_of_its_own() -> None:
    """One of two sums is off by 512 * 1e-4 nat, the other one is right."""
    inputs = make_inputs(Case("tiny", 1024, "score"))
    gate = Gate(inputs)
    off = torch.cat([torch.full((512,), 1e-4), torch.zeros(512)]).double()
    errors = gate.check(Outputs(None, gate.truth.answer.logps + off, None, None)).errors
    assert errors["sequence_max"] == pytest.approx(0.0512)
    assert errors["sequence"] == pytest.approx(0.0512 / 2**0.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_logits_pass_and_show_their_error(dtype: str) -> None:
    inputs = make_inputs(Case("tiny", 512, dtype=dtype))
    gate = Gate(inputs)
    verdicts = {
        c.name: gate.check(c.prepare(inputs)())
        for c in ALL
        if c.name in ("pytorch", "pytorch-fp32-logits")
    }
    rounded, wide = verdicts["pytorch"], verdicts["pytorch-fp32-logits"]
    assert rounded.status == wide.status == "ok"
    assert rounded.errors["logps"] > 100 * wide.errors["logps"]
    assert rounded.errors["sequence"] > 100 * wide.errors["sequence"]
    # One sum of 512 tokens: the largest is the only one.
    assert rounded.errors["sequence_max"] == pytest.approx(rounded.errors["sequence"])
    # A tenth of the weight's gradient is beyond any rounding.
    outputs = next(c for c in ALL if c.name == "pytorch").prepare(inputs)()
    assert gate.check(outputs._replace(dw=0.9 * outputs.dw)).status == "wrong"
