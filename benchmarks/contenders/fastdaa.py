"""Every path of fastdaa, with both engines."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from fastdaa import __version__
from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.contenders.base import Absent, Outputs, TokenScorer, with_gradients
from fastdaa.benchmarks.cost_model import Cost, plan_of, tiled
from fastdaa.benchmarks.inputs import HeadInputs
from fastdaa.head import LmHead
from fastdaa.logps import head_logps
from fastdaa.losses import Objective
from fastdaa.outputs import TokenSelection
from fastdaa.pair_loss import pair_loss


class Fastdaa(TokenScorer):
    """One path with one engine. The path that ``impl="auto"`` would take says so in its detail."""

    family = "fastdaa"

    def __init__(self, path: str, engine: str = "torch", max_bytes: int | None = None):
        self.path, self.engine, self.max_bytes = path, engine, max_bytes
        suffix = "" if engine == "torch" else f"-{engine}"
        if max_bytes is not None:  # less memory than the default, for the sake of memory
            suffix, self.kinds = f"{suffix}-{max_bytes >> 20}mib", ("memory",)
        self.name = f"fastdaa-{path.replace('_', '-')}{suffix}"

    def version(self) -> str:
        """fastdaa's."""
        return __version__

    def check_device(self, device: str) -> None:
        """The Triton engine needs CUDA: its interpreter is for tests."""
        if self.engine != "triton":
            return
        if device != "cuda":
            raise Absent("the Triton engine runs on CUDA devices (elsewhere it is interpreted)")
        if importlib.util.find_spec("triton") is None:
            raise Absent("triton is not installed (pip install 'fastdaa[triton]')")

    def applies(self, case: Case) -> bool:
        """Where the path can serve."""
        if self.path == "score":
            return not case.wants_grad
        if self.path == "frozen":
            return case.wants_grad and not case.head_grad
        if self.path == "single_pass":
            return case.wants_grad and (case.is_loss or case.work == "ce")
        return case.wants_grad

    def gemms(self, case: Case) -> int:
        """Those of the path, less the one for a weight that is frozen, plus an online reference."""
        products = {"score": 1, "frozen": 2, "single_pass": 3, "recompute": 4}[self.path]
        spared = self.path in ("single_pass", "recompute") and not case.head_grad
        return products - spared + (case.reference == "online")

    def cost(self, case: Case, device: str) -> Cost | None:
        """See :mod:`fastdaa.benchmarks.cost_model`."""
        return tiled(case, self.path, self.engine, device, self.max_bytes)

    def detail(self, inputs: HeadInputs) -> str | None:
        """The plan, in its own words."""
        asked, auto = (
            plan_of(
                inputs.case, self.path, inputs.device.type, impl=impl, engine=self.engine,
                max_bytes=self.max_bytes,
            )
            for impl in (self.path, "auto")
        )  # fmt: skip
        return (auto if auto.path == self.path else asked).explain()

    def score_tokens(self, hidden: Tensor, weight: Tensor, inputs: HeadInputs) -> Tensor:
        """See :class:`TokenScorer`."""
        head = LmHead(weight, softcap=inputs.case.softcap)
        # A reference's pass has no gradient whatever the path of the policy's.
        impl = self.path if torch.is_grad_enabled() else "score"
        return head_logps(
            hidden, head, inputs.targets, impl=impl, engine=self.engine, max_bytes=self.max_bytes
        )

    def prepare(self, inputs: HeadInputs) -> Callable[[], Outputs]:
        """See :class:`~fastdaa.benchmarks.contenders.base.Contender`.

        Losses go through ``pair_loss``. The mean cross-entropy is ``awr`` with advantages of 0,
        the token-level objective whose weights are then all 1.
        """
        case = inputs.case
        if not case.is_loss and self.path != "single_pass":
            return super().prepare(inputs)
        objective = Objective.parse(case.work if case.is_loss else "awr")
        rows = torch.arange(case.tokens, device=inputs.device)
        selection = TokenSelection(rows, inputs.targets, inputs.lengths, inputs.counts)
        advantages = None if case.is_loss else torch.zeros(len(inputs.counts), device=inputs.device)

        def run() -> Outputs:
            ref_logps = inputs.ref_logps
            if inputs.ref_hidden is not None:
                with torch.no_grad():
                    ref_logps = self.score_tokens(inputs.ref_hidden, inputs.weight, inputs)
            head = LmHead(inputs.weight, softcap=case.softcap)
            out = pair_loss(
                inputs.hidden, head, selection, objective, ref_token_logps=ref_logps,
                advantages=advantages, impl=self.path, engine=self.engine,
                max_bytes=self.max_bytes,
            )  # fmt: skip
            grads = torch.autograd.grad(out.loss, inputs.leaves)
            return with_gradients(out.loss, out.token_logps, grads)

        return run
