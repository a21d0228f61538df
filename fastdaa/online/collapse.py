"""Watches for a policy that stops being one: entropy, largest probabilities, jumps of KL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LEAST_ENTROPY_SHARE = 0.1
_MOST_CERTAIN = 0.99
_JUMP_NATS, _JUMP_SHARE = 1.0, 0.5


@dataclass
class CollapseMonitor:
    """Says what it sees in the metrics of an iteration's rollouts, once when it begins.

    - *entropy*: nats a token below 10 % of the reference's on the first rollouts;
    - *max_prob*: the likeliest token has more than 99 % at an average place, and the reference on
      the first rollouts had less;
    - *kl_jump*: KL rose in one iteration by more than 1 nat a sequence and by more than half.
    """

    ref_entropy: float | None = None
    """Reference on the rollouts of the first iteration, nats a token."""
    first_max_prob: float | None = None
    last_kl: float | None = None
    active: list[str] = field(default_factory=list)
    """Signs that were there at the last look."""

    @property
    def collapsed(self) -> bool:
        """Whether entropy or largest probabilities are those of a collapsed policy."""
        return "entropy" in self.active or "max_prob" in self.active

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """One sentence for each sign that was not there at the last look."""
        entropy, top = metrics["policy/token_entropy"], metrics["policy/max_prob"]
        kl, before = metrics["objective/kl"], self.last_kl
        if self.ref_entropy is None or self.first_max_prob is None:
            self.ref_entropy, self.first_max_prob = metrics["ref/token_entropy"], top
        found: dict[str, str] = {}
        if entropy < _LEAST_ENTROPY_SHARE * self.ref_entropy:
            found["entropy"] = (
                f"collapse: entropy {entropy:.3g} nats a token, below {_LEAST_ENTROPY_SHARE:.0%} "
                f"of the reference's {self.ref_entropy:.3g}"
            )
        if top > _MOST_CERTAIN and self.first_max_prob <= _MOST_CERTAIN:
            found["max_prob"] = (
                f"collapse: the likeliest token has probability {top:.4f} on average "
                f"({self.first_max_prob:.2f} in the first rollouts)"
            )
        if before is not None and kl - before > max(_JUMP_NATS, _JUMP_SHARE * before):
            found["kl_jump"] = (
                f"KL jumped from {before:.2f} to {kl:.2f} nats a sequence in one iteration"
            )
        self.last_kl = kl
        new = [text for sign, text in found.items() if sign not in self.active]
        self.active = list(found)
        return new

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {
            "ref_entropy": self.ref_entropy, "first_max_prob": self.first_max_prob,
            "last_kl": self.last_kl, "active": list(self.active),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self.ref_entropy, self.first_max_prob = state["ref_entropy"], state["first_max_prob"]
        self.last_kl, self.active = state["last_kl"], list(state["active"])
