"""The coefficient of PPO's KL term over time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_LARGEST_ERROR = 0.2


@dataclass
class FixedKL:
    """A coefficient that stays as it is."""

    coefficient: float

    def update(self, kl: float, samples: int) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the coefficient is that of the configuration."""


@dataclass
class AdaptiveKL:
    """Proportional control in log space (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    ``e = clip(KL / target - 1, -0.2, 0.2)``, ``coefficient *= 1 + e n / horizon`` after ``n``
    samples.

    Args:
        initial: first coefficient; 0 would stay 0.
        target: KL to the reference, nats a sequence.
        horizon: samples over which an error of 1 would double the coefficient.
    """

    initial: float
    target: float
    horizon: float
    coefficient: float = field(init=False)

    def __post_init__(self) -> None:
        for name in ("initial", "target", "horizon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        self.coefficient = self.initial

    def update(self, kl: float, samples: int) -> None:
        """Takes in the mean KL of ``samples`` rollouts, nats a sequence."""
        error = min(max(kl / self.target - 1, -_LARGEST_ERROR), _LARGEST_ERROR)
        self.coefficient *= 1 + error * samples / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self.coefficient = state["coefficient"]


KLController = FixedKL | AdaptiveKL
