"""Every path of fastdaa, with every engine."""

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

ENGINES_OF = {
    "score": ("torch", "triton", "fused"),
    "frozen": ("torch", "triton"),
    "single_pass": ("torch", "triton"),
    "recompute": ("torch", "triton"),
}
"""Engines by path; ``fused`` has no gradient."""
LESS_BYTES = 280 << 20
"""``max_bytes`` of a call that is asked for little memory: 8192 selected rows of 4096 bf16 entries,
their gradient, and its fp32 sum take 256 MiB."""


def name_of(path: str, engine: str = "torch", max_bytes: int | None = None) -> str:
    """The name of a contender, such as ``fastdaa-single-pass-triton``."""
    parts = ["fastdaa", path.replace("_", "-")]
    parts += [engine] if engine != "torch" else []
    parts += [f"{max_bytes >> 20}mib"] if max_bytes is not None else []
    return "-".join(parts)


class Fastdaa(TokenScorer):
    """One path with one engine. The path that ``impl="auto"`` would take says so in its detail.

    Args:
        max_bytes: less memory than the default, for the sake of memory.
        kinds: the benchmarks that it is in without being named; by default ``"memory"`` with
            ``max_bytes``, else all.
        interpreted: on a CPU the Triton engines run in the interpreter, for rehearsals.
    """

    family = "fastdaa"

    def __init__(
        self,
        path: str,
        engine: str = "torch",
        max_bytes: int | None = None,
        *,
        kinds: tuple[str, ...] | None = None,
        interpreted: bool = False,
    ):
        self.path, self.engine, self.max_bytes = path, engine, max_bytes
        self.interpreted = interpreted
        if kinds is not None or max_bytes is not None:
            self.kinds = ("memory",) if kinds is None else kinds
        self.name = name_of(path, engine, max_bytes)

    def version(self) -> str:
        """fastdaa's."""
        return __version__

    def check_device(self, device: str) -> None:
        """The Triton engines need CUDA: the interpreter is for tests and rehearsals."""
        if self.engine == "torch":
            return
        if device != "cuda" and not self.interpreted:
            raise Absent("the Triton engines run on CUDA devices (elsewhere they are interpreted)")
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
        kept = 2 * case.tokens * case.vocab  # bytes of the gradients of all logits
        if self.path == "single_pass" and self.max_bytes is not None and kept > self.max_bytes:
            products = 4  # nearly all logits are computed again
        spared = self.path in ("single_pass", "recompute") and not case.head_grad
        if self.path == "recompute" and self.max_bytes is not None and not spared:
            plan = plan_of(
                case, self.path, "cuda", impl=self.path, engine=self.engine,
                max_bytes=self.max_bytes,
            )  # fmt: skip
            products = int(plan.gemms)  # 4, or 5 where memory is short
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
