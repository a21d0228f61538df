"""QuACK's chunked linear cross-entropy (CuTe DSL): the roof of the mean cross-entropy."""

from __future__ import annotations

from torch import Tensor

from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.contenders.base import TokenScorer, installed, needs_cuda
from fastdaa.benchmarks.inputs import HeadInputs


class Quack(TokenScorer):
    """``chunked_linear_cross_entropy``: a mean, and no log-probs of tokens."""

    name, family = "quack", "quack"

    def version(self) -> str:
        """quack-kernels'."""
        return installed("quack-kernels", "pip install quack-kernels, on a Hopper or newer GPU")

    def check_device(self, device: str) -> None:
        """CUDA."""
        needs_cuda("QuACK", device)

    def applies(self, case: Case) -> bool:
        """The mean cross-entropy."""
        return case.work == "ce"

    def supports(self, case: Case) -> str | None:
        """Half precision, no softcap."""
        if case.softcap is not None:
            return "QuACK's linear cross-entropy has no softcap"
        return "QuACK takes fp16 and bf16" if case.dtype == "float32" else None

    def gemms(self, case: Case) -> int:
        """No product twice."""
        return 2 + case.wants_head_grad

    def score_tokens(self, hidden: Tensor, weight: Tensor, inputs: HeadInputs) -> Tensor:
        """The mean over all tokens, negated."""
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return -chunked_linear_cross_entropy(hidden, weight, inputs.targets, reduction="mean")
