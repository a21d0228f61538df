"""Reference PyTorch: logits materialised, eager or compiled, and torch's own fused function.

``pytorch`` is what users write: a product in the dtype of the inputs, logits to fp32, log-softmax,
gather. It is the reference of every speed-up. ``pytorch-fp32-logits`` widens the inputs first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.contenders.base import Absent, TokenScorer
from fastdaa.benchmarks.cost_model import Cost, materialised
from fastdaa.benchmarks.inputs import HeadInputs


def _log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, widen: bool
) -> Tensor:
    if widen:
        hidden, weight = hidden.float(), weight.float()
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


class Materialised(TokenScorer):
    """Eager, logits in the dtype of the inputs, then fp32."""

    name, family, widen = "pytorch", "pytorch", False

    def version(self) -> str:
        """Torch's."""
        return torch.__version__

    def gemms(self, case: Case) -> int:
        """One product forward, one for each gradient; one more for an online reference."""
        return case.wants_grad + case.wants_head_grad + 1 + (case.reference == "online")

    def cost(self, case: Case, device: str) -> Cost | None:
        """See :mod:`fastdaa.benchmarks.cost_model`."""
        return materialised(case, device)

    def score_tokens(self, hidden: Tensor, weight: Tensor, inputs: HeadInputs) -> Tensor:
        """See :class:`TokenScorer`."""
        return _log_probs(hidden, weight, inputs.targets, inputs.case.softcap, self.widen)


class MaterialisedWide(Materialised):
    """The same with inputs widened to fp32: the most accurate way that materialises logits."""

    name, widen, kinds = "pytorch-fp32-logits", True, ("accuracy",)

    def applies(self, case: Case) -> bool:
        """For half precision; in fp32 it is ``pytorch``."""
        return case.dtype != "float32"

    def cost(self, case: Case, device: str) -> Cost | None:
        """None: products in fp32 are not at the roof of the case's dtype."""
        return None


class Compiled(Materialised):
    """``torch.compile`` of the same."""

    name = "torch-compile"

    def check_device(self, device: str) -> None:
        """Where its compiler works."""
        needs_compiler(device)

    def cost(self, case: Case, device: str) -> Cost | None:
        """None: what gets fused is the compiler's choice."""
        return None

    def scorer(self, inputs: HeadInputs) -> Callable[[Tensor, Tensor], Tensor]:
        """A fresh compilation for the shapes of this case."""
        torch._dynamo.reset()
        compiled = torch.compile(_log_probs, dynamic=False)
        return lambda hidden, weight: compiled(
            hidden, weight, inputs.targets, inputs.case.softcap, False
        )


def needs_compiler(device: str) -> None:
    """Raise :class:`Absent` where ``torch.compile`` does not work."""
    problem = compiler_problem(device)
    if problem is not None:
        raise Absent(problem)


@cache
def compiler_problem(device: str) -> str | None:
    """Why ``torch.compile`` does not work on this device, or None. Without a C++ compiler it works
    on CUDA alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(lambda x: (x + 1).sum(), dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        return f"torch.compile does not work here: {type(error).__name__}: {error}".split("\n")[0]
    return None


class LinearCrossEntropy(Materialised):
    """``torch.nn.functional.linear_cross_entropy``, torch 2.13 and later, as its documentation
    advises: in chunks with automatic options where there are at least ``D`` tokens and more than
    ``D`` classes, else the plain way.

    In chunks ``reduction="none"`` gives log-probs in the dtype of the inputs and computes the
    logits twice; ``"mean"`` computes them once.
    """

    name = "torch-linear-ce"

    def version(self) -> str:
        """Torch's, if it has the function."""
        if not hasattr(F, "linear_cross_entropy"):
            raise Absent(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")
        return torch.__version__

    def supports(self, case: Case) -> str | None:
        """No softcap."""
        return "linear_cross_entropy has no softcap" if case.softcap is not None else None

    def gemms(self, case: Case) -> int:
        """Of chunks, log-probs are recomputed in backward; the mean is not."""
        again = case.wants_grad and case.work != "ce" and in_chunks(case)
        return super().gemms(case) + again

    def cost(self, case: Case, device: str) -> Cost | None:
        """None: the size of its chunks is its own affair."""
        return None

    def detail(self, inputs: HeadInputs) -> str:
        """Which of its two ways."""
        if in_chunks(inputs.case):
            return "LinearCrossEntropyOptions(): in chunks"
        return "options=None: below D tokens it advises against chunks"

    def score_tokens(self, hidden: Tensor, weight: Tensor, inputs: HeadInputs) -> Tensor:
        """See :class:`TokenScorer`."""
        options = torch.nn.LinearCrossEntropyOptions() if in_chunks(inputs.case) else None
        reduction = "mean" if inputs.case.work == "ce" else "none"
        nll = F.linear_cross_entropy(
            hidden, weight, inputs.targets, reduction=reduction, options=options
        )
        return -nll


def in_chunks(case: Case) -> bool:
    """Where ``torch.nn.LinearCrossEntropyOptions`` says that chunks are a win."""
    return case.tokens >= case.hidden and case.vocab > case.hidden
