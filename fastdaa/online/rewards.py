"""From the scores of a reward source to rewards of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RunningStd:
    """Standard deviation of all scores so far, to divide scores by (Chan et al. 1979).

    The authors of arXiv 2306.02231 divide by it and do not subtract the mean; so does this.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0
        """Sum of squared distances from the mean."""

    def update(self, scores: Tensor) -> float:
        """Takes in ``scores [S]``; the deviation of all so far, 1 as long as it is unknown or 0."""
        values = scores.double()
        count, mean = len(values), float(values.mean())
        total = self.count + count
        shift = mean - self.mean
        self.squares += float((values - mean).square().sum())
        self.squares += shift * shift * self.count * count / total
        self.mean += shift * count / total
        self.count = total
        return self.std

    @property
    def std(self) -> float:
        """Unbiased; 1 as long as it is unknown or 0."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return variance**0.5 if variance > 0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


def shape_scores(
    raw: Tensor,
    finished: Tensor,
    *,
    running: RunningStd | None = None,
    clip: float | None = None,
    missing_eos_penalty: float = 0.0,
) -> Tensor:
    """``[S]`` fp32 scores: divided by the running deviation, clipped, then less the penalty.

    Args:
        raw: ``[S]`` of the reward source.
        finished: ``[S]`` bool.
        running: takes in ``raw`` and divides by the deviation of everything so far; None to leave
            the scale.
        clip: largest absolute value after scaling.
        missing_eos_penalty: taken off completions that are not finished, in units of the scaled
            score; at least 0.
    """
    scores = raw.float()
    if running is not None:
        scores = scores / running.update(raw)
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return scores - missing_eos_penalty * (~finished).float()


def token_rewards(
    scores: Tensor,
    lengths: Tensor,
    *,
    logratios: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """``[N]`` rewards: the score at the last token, and PPO's cost of KL at every token.

    ``r_t = -kl_coef (log pi_old - log pi_ref)_t + 1[t last] score`` (arXiv 2009.01325, eq. 2). APA
    and AWR have no KL in the reward: they call it without ``logratios``.

    Args:
        scores: ``[S]``.
        lengths: ``[S]`` int64, at least 1 each.
        logratios: ``[N]`` log policy - log reference of the sampled tokens.
    """
    tokens = int(lengths.sum())
    if logratios is None:
        rewards = scores.new_zeros(tokens)
    else:
        rewards = -kl_coef * logratios.to(scores.dtype)
    last = lengths.cumsum(0) - 1
    return rewards.index_add(0, last.to(rewards.device), scores)


def sequence_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """``[N]`` to ``[S]``, in fp64."""
    return torch.segment_reduce(values.double(), "sum", lengths=lengths)
