"""Apple's cut-cross-entropy: the Triton kernels with and without their filter, and its fallback."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.contenders.base import TokenScorer, installed, needs_cuda
from fastdaa.benchmarks.contenders.pytorch import needs_compiler
from fastdaa.benchmarks.inputs import HeadInputs


class CutCrossEntropy(TokenScorer):
    """``linear_cross_entropy`` with the options of one row.

    The package's default filters: tiles in which every probability is small are left out of the
    gradients. Its FLOP then depend on the data; :meth:`gemms` counts all tiles.
    """

    family = "cce"

    def __init__(self, name: str, **options: Any):
        self.name, self.options = name, options

    def version(self) -> str:
        """The package's, which may be older than its repository."""
        return installed("cut-cross-entropy", "pip install 'fastdaa[bench]'")

    def check_device(self, device: str) -> None:
        """CUDA for the kernels; the fallback is compiled PyTorch."""
        if self.options["impl"] == "cce":
            needs_cuda("cut-cross-entropy", device)
        else:
            needs_compiler(device)

    def applies(self, case: Case) -> bool:
        """The fallback where its own function is the work: it is what ``torch-compile`` does."""
        return self.options["impl"] == "cce" or not case.is_loss

    def gemms(self, case: Case) -> int:
        """The kernels compute logits twice, the fallback once."""
        again = case.wants_grad and self.options["impl"] == "cce"
        return 1 + case.wants_grad + case.wants_head_grad + again + (case.reference == "online")

    def score_tokens(self, hidden: Tensor, weight: Tensor, inputs: HeadInputs) -> Tensor:
        """See :class:`TokenScorer`."""
        from cut_cross_entropy import linear_cross_entropy

        reduction = "mean" if inputs.case.work == "ce" else "none"
        return -linear_cross_entropy(
            hidden, weight, inputs.targets, softcap=inputs.case.softcap, reduction=reduction,
            **self.options,
        )  # fmt: skip


CONTENDERS = [
    CutCrossEntropy("cce", impl="cce"),
    CutCrossEntropy("cce-exact", impl="cce", filter_eps=None),
    CutCrossEntropy("cce-torch-compile", impl="torch_compile"),
]
