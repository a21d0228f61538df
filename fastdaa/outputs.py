"""Named tuples that travel between the rooms of the library.

Sizes: ``B`` pairs, ``S = 2B`` sequences, ``N`` scored tokens, ``D`` hidden, ``V`` vocabulary.
Sequences are pair-major: sequence ``2i`` is the chosen and ``2i + 1`` the rejected completion of
pair ``i``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenSelection(NamedTuple):
    """Which hidden states are scored, against which tokens, for which sequence.

    The scored tokens of one sequence are contiguous, and sequences follow each other in order, so
    that a contiguous slice of tokens can hold whole pairs.
    """

    rows: Tensor
    """``[N]`` int64: row of the flattened hidden states that predicts each scored token."""
    targets: Tensor
    """``[N]`` int64: the token that each row has to predict."""
    lengths: Tensor
    """``[S]`` int64: scored tokens of each sequence."""
    counts: tuple[int, ...]
    """``lengths`` again, as host integers, so that nothing has to wait for a device."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenSelection:
        """The same selection with its tensors on ``device``."""
        rows, targets, lengths = (t.to(device, non_blocking=non_blocking) for t in self[:3])
        return TokenSelection(rows, targets, lengths, self.counts)


class PairLogps(NamedTuple):
    """Log-probabilities of both completions of every pair under one model, in nats."""

    chosen: Tensor
    """``[B]`` fp32 (or wider): sum over the chosen completion's tokens."""
    rejected: Tensor
    """``[B]`` the same for the rejected completion."""
    chosen_lengths: Tensor
    """``[B]`` int64: completion tokens of the chosen side; the divisor of per-token means."""
    rejected_lengths: Tensor
    """``[B]`` int64: the same for the rejected side."""


class BatchTotals(NamedTuple):
    """What a loss may have to know about the whole batch while it sees a chunk of it."""

    pairs: int
    """Pairs in the whole batch: the divisor of the mean over pairs."""
    chosen_tokens: int
    """Chosen completion tokens in the whole batch: the divisor of the SFT term's token mean."""
    tokens: int | None = None
    """Scored tokens of both sides in the whole batch: the divisor of token-level objectives."""


class TokenStats(NamedTuple):
    """Per-token statistics of the predicted distribution, all ``[N]`` fp32 and without gradient."""

    entropy: Tensor
    """Entropy in nats."""
    top1: Tensor
    """1 where no other token is more probable than the target, else 0."""
    mean_logit: Tensor
    """Mean logit over the vocabulary."""


class PairLossOutput(NamedTuple):
    """What one evaluation of a pair loss returns."""

    loss: Tensor
    """Scalar: sum of ``losses`` over the pairs of the whole batch (the mean, if all of them are
    here); the only entry that carries a gradient."""
    losses: Tensor
    """``[B]`` loss of every pair."""
    policy: PairLogps
    """Policy log-probabilities, detached."""
    token_logps: Tensor
    """``[N]`` policy log-probability of every scored token, detached."""
    stats: TokenStats | None
    """Token statistics, if asked for."""
