"""How a policy is sampled while its quality is tracked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastdaa.validation import check_positive


@dataclass(frozen=True)
class TrackSettings:
    """What every measurement of a run has in common.

    Raises:
        ValueError: a number out of range.
    """

    prompts: int = 64
    """Held-out prompts, each answered once."""
    max_new_tokens: int = 256
    """An answer is cut after so many tokens."""
    temperature: float = 1.0
    """Of the sampled policy; KL and entropy are those of policy and reference at it."""
    batch_size: int = 16
    """Prompts that are answered at a time."""
    seed: int = 0
    """Chooses the prompts, and starts the random numbers of every batch."""

    def __post_init__(self) -> None:
        for name in ("prompts", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}: expected an integer above 0, got {value!r}")
            check_positive(name, value)
        check_positive("temperature", self.temperature)
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed: expected an integer of at least 0, got {self.seed!r}")

    def columns(self) -> dict[str, Any]:
        """The settings as columns of the table: only rows that agree in them compare."""
        names = {"prompts": "track_prompts", "seed": "track_seed"}
        return {names.get(name, name): value for name, value in asdict(self).items()}
