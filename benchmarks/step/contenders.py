"""Who takes part in the step benchmark: what differs from each library's defaults."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastdaa import __version__
from fastdaa.benchmarks.step.cases import Case


@dataclass(frozen=True)
class Contender:
    """One trainer in one configuration.

    Args:
        name: the name in rows.
        library: ``trl`` or ``fastdaa``.
        layout: how pairs lie in a batch; TRL's is always ``padded``.
        sorted: fed pairs in batches of similar length, the batches in random order.
        cached: reference log-probs are computed before training.
        liger: liger-kernel's layer kernels (RMSNorm, SwiGLU, RoPE) under TRL's fused head.
        config: further settings of the library's configuration class.
    """

    name: str
    library: str
    layout: str = "padded"
    sorted: bool = False
    cached: bool = False
    liger: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def version(self) -> str:
        """Of the package that does the work.

        Raises:
            importlib.metadata.PackageNotFoundError: it is not installed.
        """
        # fastdaa runs from a checkout, too, which has no metadata.
        number = __version__ if self.library == "fastdaa" else version(self.library)
        own = f"{self.library} {number}"
        return f"{own}, liger-kernel {version('liger-kernel')}" if self.liger else own

    def absence(self, case: Case, device: str) -> str | None:
        """Why this contender cannot take part here, or None."""
        if importlib.util.find_spec(self.library) is None:
            floor = " (TRL 1.16 needs Python 3.11)" if sys.version_info < (3, 11) else ""
            return f"{self.library} is not installed{floor}"
        if self.liger:
            if device == "cpu":
                return "liger-kernel's layer kernels are Triton: CUDA only"
            if importlib.util.find_spec("liger_kernel") is None:
                return "liger-kernel is not installed"
        if case.tuning == "lora" and importlib.util.find_spec("peft") is None:
            return "peft is not installed"
        try:
            self.version()
        except PackageNotFoundError as error:
            return f"{error.name}: expected an installed package with metadata"
        return None


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("trl", "trl"),
        Contender("trl-sorted", "trl", sorted=True),
        Contender("trl-precomputed", "trl", cached=True),
        Contender("trl-sorted-precomputed", "trl", sorted=True, cached=True),
        Contender("trl-liger", "trl", liger=True),
        Contender("fastdaa-padded", "fastdaa", "padded"),
        Contender("fastdaa-packed", "fastdaa", "packed"),
        Contender("fastdaa-prefix_shared", "fastdaa", "prefix_shared"),
        Contender("fastdaa-prefix_shared-sorted", "fastdaa", "prefix_shared", sorted=True),
        Contender("fastdaa-prefix_shared-cached", "fastdaa", "prefix_shared", cached=True),
    )
}
REFERENCE = "trl"
"""Speed-ups are against this contender of the same case."""


def choose(names: Sequence[str]) -> list[Contender]:
    """Contenders by name, the reference first: its row is needed for the others' speed-up.

    ``fastdaa`` stands for all of ours.

    Raises:
        ValueError: an unknown name.
    """
    ours = [name for name in CONTENDERS if name.startswith("fastdaa-")]
    names = [one for name in names for one in (ours if name == "fastdaa" else [name])]
    for name in names:
        if name not in CONTENDERS:
            near = difflib.get_close_matches(name, CONTENDERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(CONTENDERS)}"
            raise ValueError(
                f"--contenders: expected names of step contenders, got {name!r}; {hint}"
            )
    return [CONTENDERS[name] for name in sorted(dict.fromkeys(names), key=lambda n: n != REFERENCE)]
