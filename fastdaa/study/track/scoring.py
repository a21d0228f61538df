"""What a scorer is: from samples to one number each. Reward models, functions and judges are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from fastdaa.study.track.prompts import Prompt


class ScorerError(ValueError):
    """A scorer that cannot be set up, failed, took too long or answered nonsense."""


class Sample(NamedTuple):
    """A prompt, the policy's answer, and what is known of the answer."""

    prompt: Prompt
    answer: str
    tokens: int
    """Tokens of the answer, the one that ends it included."""
    finished: bool
    """False where the answer was cut at ``max_new_tokens``."""
    k1: float
    """Log-ratio of policy to reference, in nats."""
    rb: float
    """Exact divergences of the next-token distributions, summed over the answer, in nats."""
    entropy: float
    """The same sum of entropies, in nats."""


class Scores(NamedTuple):
    """What a scorer says."""

    values: list[float]
    """One for each sample, higher is better."""
    columns: dict[str, float]
    """More about all of them together, for the table."""


class Scorer(Protocol):
    """Scores samples."""

    column: str
    """``reward`` or ``win_rate``: the column of the table that holds the mean."""
    label: str
    """What scores, as the user named it."""

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """One value a sample.

        Raises:
            ScorerError: there are none.
        """
