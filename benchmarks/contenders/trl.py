"""TRL's fused head: ``ChunkedLogProbFunction``, what every DPOTrainer since trl 1.15 runs.

It is called with the rows that are scored, as TRL does on CUDA; on other devices its trainer also
projects prompts and padding. Logits are rounded to the dtype of the inputs in its tiles; gradients
are summed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.contenders.base import Absent, TokenScorer, installed
from fastdaa.benchmarks.cost_model import Cost, vocabulary_chunks
from fastdaa.benchmarks.inputs import HeadInputs


class FusedHead(TokenScorer):
    """Log-probs alone, or with the metrics that its DPOTrainer always asks for."""

    family = "trl"

    def __init__(self, metrics: bool = False):
        self.name = "trl-metrics" if metrics else "trl"
        self.outputs = ("entropy", "mean_logits", "is_top1") if metrics else ()

    def version(self) -> str:
        """TRL's, from 1.15."""
        version = installed("trl", "pip install 'fastdaa[bench]', Python 3.11 or newer")
        try:
            from trl.kernels import ChunkedLogProbFunction  # noqa: F401
        except ImportError as error:
            raise Absent(f"trl {version} has no fused head (1.16 has): {error}") from error
        return version

    def applies(self, case: Case) -> bool:
        """With metrics: as part of training."""
        return not self.outputs or case.is_loss

    def gemms(self, case: Case) -> int:
        """Logits twice where there is a backward pass."""
        return 1 + 2 * case.wants_grad + case.wants_head_grad + (case.reference == "online")

    def cost(self, case: Case, device: str) -> Cost | None:
        """See :mod:`fastdaa.benchmarks.cost_model`."""
        return vocabulary_chunks(case, device)

    def scorer(self, inputs: HeadInputs) -> Callable[[Tensor, Tensor], Tensor]:
        """Its trainers' modules are imported here: on a slow disk that takes longer than a run."""
        import trl.trainer.utils  # noqa: F401

        return super().scorer(inputs)

    def score_tokens(self, hidden: Tensor, weight: Tensor, inputs: HeadInputs) -> Tensor:
        """See :class:`TokenScorer`."""
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

        return ChunkedLogProbFunction.apply(
            hidden, weight, None, inputs.targets, 1.0, columns, inputs.case.softcap, 1.0,
            self.outputs,
        )[0]  # fmt: skip
