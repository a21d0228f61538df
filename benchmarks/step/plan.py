"""What a worker process needs to know about a case: plain values that can be sent to it."""

from __future__ import annotations

from dataclasses import dataclass

from fastdaa.benchmarks.step.cases import Case

# The same objective under each library's name.
LOSSES = {"dpo": ("sigmoid", "dpo"), "slic": ("hinge", "slic"), "ipo": ("ipo", "ipo_norm")}
BETA = 0.1
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Plan:
    """A case on a device, with its pairs in ``folder``."""

    case: Case
    folder: str
    device: str
    threads: int
    seed: int
    loss: str = "dpo"
    lr: float = 1e-5

    @property
    def all_steps(self) -> int:
        """Timed steps and those before them."""
        return self.case.steps + self.case.warmup

    @property
    def mixed(self) -> bool:
        """bf16 autocast over fp32 weights, what both libraries do on CUDA."""
        return self.device == "cuda"
