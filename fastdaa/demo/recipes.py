"""How the demo uses each loss, and how much it does."""

from __future__ import annotations

from typing import NamedTuple


class Recipe(NamedTuple):
    """How a loss is used in the demo."""

    label: str
    loss: str
    beta: float
    learning_rate: float = 5e-4

    @property
    def name(self) -> str:
        """What table and picture call the policy."""
        return f"{self.label}, beta {self.beta:g}"


RECIPES = {
    "dpo": Recipe("DPO", "dpo", beta=0.2),
    "ipo": Recipe("IPO", "ipo", beta=0.05),
    "slic": Recipe("SLiC", "slic", beta=0.2),
}
TOO_FAR = Recipe("DPO", "dpo", beta=0.01, learning_rate=1e-3)
"""Hardly regularised and fast: it shows what over-optimisation looks like."""


class Size(NamedTuple):
    """How much of everything: the whole demo, or a glimpse of it."""

    train_pairs: int | None = None
    prompts: int = 200
    sft_epochs: int = 5
    align_epochs: float = 1.0
    points: int = 6
    """Evaluations of a policy while it trains, its end included."""


FAST = Size(train_pairs=96, prompts=8, sft_epochs=1, align_epochs=1.0, points=2)
