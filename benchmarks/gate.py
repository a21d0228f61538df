"""The gate: what a contender returned, held against fp64. A wrong row has no speed-up.

Limits are hard ones: they are to catch what is wrong, and let what is merely rounded pass with its
error in the row. They come from plain PyTorch on the same inputs (:func:`.oracle.plain_pytorch`
with its logits rounded to the dtype of the inputs; in fp32 nothing is rounded). With its errors
``e``, the unit roundoff ``u`` of the dtype (2^-8 in bf16, 2^-11 in fp16, 2^-24 in fp32), the
largest logit ``z``, and ``s = 4 * 2^-24 * z`` for log-sum-exps in fp32:

- a log-prob: ``4 max(e) + u max(abs(logp)) + s`` nat
- the loss: the same with root mean squares in place of largest values, times the norm of its
  derivative by the log-probs, plus ``s`` times the sum of its absolute values, plus ``4 u
  abs(loss)``
- dH and dW, relative Frobenius error: ``4 e + 8 u + s``; 8 u leaves room for a sum over about a
  hundred chunks in the dtype of the inputs
- the worst row of dH (a token) or dW (a vocabulary entry), relative to its norm or to the root mean
  square of all rows if that is larger: ``4 e + 64 u + s``
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdaa.benchmarks.contenders.base import Outputs
from fastdaa.benchmarks.inputs import HeadInputs
from fastdaa.benchmarks.oracle import Answer, Truth, find_truth, plain_pytorch

_FP32 = 2.0**-24
_ROWS = 8192
SUM_TOKENS = 512


@dataclass(frozen=True)
class Verdict:
    """Whether an answer may be used, and its errors."""

    status: str
    """``"ok"`` or ``"wrong"``."""
    reason: str | None
    """What is wrong, in one clause."""
    errors: dict[str, Any]
    """``logps``: largest, in nats; ``logps_rms``; ``sequence``: root mean square over sums of 512
    tokens, in nats, and ``sequence_max`` the largest of them; ``loss``: absolute; ``dh``, ``dw``:
    relative; ``dh_row``, ``dw_row``: the worst row; ``limit``: those that the status follows
    from."""


class Gate:
    """Truth and limits of one case, at the cost of one product in fp64 and three in fp32."""

    def __init__(self, inputs: HeadInputs):
        self.inputs = inputs
        self.truth: Truth = find_truth(inputs)
        rounded = plain_pytorch(inputs, round_logits=True)
        self.plain = self._errors(rounded)
        """Errors of plain PyTorch with logits in the dtype of the inputs."""
        self.limits = self._limits()

    @property
    def entropy(self) -> float:
        """Mean entropy of the predictions, in nats."""
        return self.truth.answer.entropy

    def check(self, outputs: Outputs) -> Verdict:
        """Compare what a run returned. What the case wants and is not there is wrong, but for
        log-probs of contenders that only give a loss."""
        problem = self._missing(outputs)
        if problem is not None:
            return Verdict("wrong", problem, {"limit": self.limits})
        errors = self._errors(outputs)
        for name, limit in self.limits.items():
            # Written so that a NaN is beyond every limit.
            if name in errors and not errors[name] <= limit:
                reason = f"{name}: error {errors[name]:.3g} beyond the limit {limit:.3g}"
                return Verdict("wrong", reason, {**errors, "limit": self.limits})
        return Verdict("ok", None, {**errors, "limit": self.limits})

    def _missing(self, outputs: Outputs) -> str | None:
        case = self.inputs.case
        wanted: dict[str, tuple[int, ...]] = {}
        if case.wants_grad:
            wanted["dh"] = (case.tokens, case.hidden)
        if case.wants_head_grad:
            wanted["dw"] = (case.vocab, case.hidden)
        if case.is_loss or case.work == "ce":
            wanted["loss"] = ()
        else:
            wanted["logps"] = (case.tokens,)
        for name, shape in wanted.items():
            value = getattr(outputs, name)
            if value is None:
                return f"{name}: expected {list(shape)}, got nothing"
            if tuple(value.shape) != shape:
                return f"{name}: expected {list(shape)}, got {list(value.shape)}"
        return None

    @torch.no_grad()
    def _errors(self, outputs: Outputs | Answer) -> dict[str, float]:
        truth, errors = self.truth.answer, {}
        if outputs.logps is not None:
            difference = outputs.logps.double() - truth.logps
            errors["logps"] = _largest(difference)
            errors["logps_rms"] = float(difference.square().mean().sqrt())
            whole = difference.numel() // SUM_TOKENS * SUM_TOKENS
            if whole:
                sums = difference[:whole].view(-1, SUM_TOKENS).sum(dim=1)
                errors["sequence"] = float(sums.square().mean().sqrt())
                errors["sequence_max"] = _largest(sums)
        if outputs.loss is not None and truth.loss is not None:
            errors["loss"] = abs(float(outputs.loss.double() - truth.loss))
        for name in ("dh", "dw"):
            got, right = getattr(outputs, name), getattr(truth, name)
            if got is not None and right is not None:
                errors[name], errors[f"{name}_row"] = self._gradient_errors(got, right)
        return errors

    def _gradient_errors(self, got: Tensor, right: Tensor) -> tuple[float, float]:
        """Relative Frobenius error, and that of the worst row, in the random directions."""
        probes = self.truth.probes
        parts = [got[i : i + _ROWS].double() @ probes for i in range(0, got.shape[0], _ROWS)]
        off = (torch.cat(parts) - right).square().sum(dim=1)
        size = right.square().sum(dim=1)
        if not size.any():  # no gradient is right: a hinge without active pairs
            return _largest(off), _largest(off)
        return (
            math.sqrt(float(off.sum() / size.sum())),
            math.sqrt(_largest(off / torch.maximum(size, size.mean()))),
        )

    def _limits(self) -> dict[str, float]:
        truth, plain = self.truth.answer, self.plain
        unit = torch.finfo(self.inputs.hidden.dtype).eps / 2
        sums = 4 * _FP32 * truth.largest_logit
        limits = {"logps": 4 * plain["logps"] + unit * _largest(truth.logps) + sums}
        if truth.loss is not None and truth.coefficients is not None:
            norm = float(truth.coefficients.norm())
            size = float(truth.logps.square().mean().sqrt())
            typical = 4 * plain["logps_rms"] + unit * size + sums
            biased = float(truth.coefficients.abs().sum()) * sums
            limits["loss"] = norm * typical + biased + 4 * unit * abs(float(truth.loss))
        for name, units in (("dh", 8), ("dw", 8), ("dh_row", 64), ("dw_row", 64)):
            if name in plain:
                limits[name] = 4 * plain[name] + units * unit + sums
        return limits


def _largest(values: Tensor) -> float:
    """Largest absolute value; NaN if there is one."""
    return float(values.abs().amax())
