"""Named tuples that travel between the rooms of the library.

Sizes: ``B`` pairs, ``S = 2B`` sequences, ``N`` scored tokens, ``D`` hidden, ``V`` vocabulary.
Sequences are pair-major: sequence ``2i`` is the chosen and ``2i + 1`` the rejected completion of
pair ``i``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def short(value: Any) -> str:
    """A tensor as dtype, shape and device (unless it is the CPU); anything else as it is."""
    if not isinstance(value, Tensor):
        return repr(value)
    device = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{device}"


def _mean(values: Any) -> str:
    """The mean as a number; empty where there are none, as in a trace or on ``meta``."""
    if type(values) is not Tensor or values.is_meta or values.numel() == 0:
        return ""
    return f"{values.detach().double().mean().item():.4g}"


def _margin(logps: Any) -> str:
    """Of :class:`PairLogps`, which somebody may have filled with something else than tensors."""
    chosen, rejected = logps.chosen, logps.rejected
    if not isinstance(chosen, Tensor) or not isinstance(rejected, Tensor):
        return ""
    return _mean(chosen - rejected) if chosen.shape == rejected.shape else ""


def _row(name: str, fields: dict[str, Any], **numbers: str) -> str:
    """``Name(number 0.5; field=float32[3], ...)``, without numbers that are not known."""
    told = [f"{words.replace('_', ' ')} {number}" for words, number in numbers.items() if number]
    shown = ", ".join(f"{field}={short(value)}" for field, value in fields.items())
    return f"{name}({'; '.join([', '.join(told), shown] if told else [shown])})"


class TokenSelection(NamedTuple):
    """Which hidden states are scored, against which tokens, for which sequence.

    The scored tokens of one sequence are contiguous, and sequences follow each other in order, so
    that a contiguous slice of tokens can hold whole pairs.

    Attributes:
        rows: ``[N]`` int64: row of the flattened hidden states that predicts each scored token.
        targets: ``[N]`` int64: the token that each row has to predict.
        lengths: ``[S]`` int64: scored tokens of each sequence.
        counts: ``lengths`` again, as host integers, so that nothing has to wait for a device.
    """

    rows: Tensor
    targets: Tensor
    lengths: Tensor
    counts: tuple[int, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenSelection:
        """The same selection with its tensors on ``device``."""
        rows, targets, lengths = (t.to(device, non_blocking=non_blocking) for t in self[:3])
        return TokenSelection(rows, targets, lengths, self.counts)

    def __repr__(self) -> str:
        return _row("TokenSelection", {name: getattr(self, name) for name in self._fields[:3]})


class PairLogps(NamedTuple):
    """Log-probabilities of both completions of every pair under one model, in nats.

    Attributes:
        chosen: ``[B]`` fp32 (or wider): sum over the chosen completion's tokens.
        rejected: ``[B]``: the same for the rejected completion.
        chosen_lengths: ``[B]`` int64: tokens of the chosen completion, the divisor of per-token
            means.
        rejected_lengths: ``[B]`` int64: the same for the rejected completion.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    def __repr__(self) -> str:
        return _row("PairLogps", self._asdict(), mean_margin=_margin(self))


class BatchTotals(NamedTuple):
    """What a loss may have to know about the whole batch while it sees a chunk of it.

    Attributes:
        pairs: pairs in the whole batch, the divisor of the mean over pairs.
        chosen_tokens: tokens of all chosen completions, the divisor of the ``sft`` term's mean.
        tokens: scored tokens of both sides, the divisor of token-level objectives; None if there
            are none of these.
    """

    pairs: int
    chosen_tokens: int
    tokens: int | None = None


class TokenStats(NamedTuple):
    """Per-token statistics of the predicted distribution, all ``[N]`` fp32 and without gradient.

    Attributes:
        entropy: entropy in nats.
        top1: 1 where no other token is more probable than the target, else 0.
        mean_logit: mean logit over the vocabulary.
        log_sum_sq: log of the sum of the squared probabilities, in nats; 0 where one token has
            all, ``-log V`` where all have the same.
    """

    entropy: Tensor
    top1: Tensor
    mean_logit: Tensor
    log_sum_sq: Tensor

    def __repr__(self) -> str:
        return _row("TokenStats", self._asdict(), mean_entropy=_mean(self.entropy))


STATISTICS = len(TokenStats._fields)
"""Statistics of a token."""


class PairLossOutput(NamedTuple):
    """What one evaluation of a pair loss returns.

    Attributes:
        loss: scalar: the sum of ``losses``, divided by the pairs of the whole batch (the mean, if
            all of them are here); the only entry that carries a gradient.
        losses: ``[B]``: loss of every pair.
        policy: policy log-probabilities, detached.
        token_logps: ``[N]``: policy log-probability of every scored token in nats, detached.
        stats: token statistics, or None unless asked for.
        pair_weights: ``[B]``: what the loss of every pair was multiplied by, with
            ``use_weighting``; else None.
    """

    loss: Tensor
    losses: Tensor
    policy: PairLogps
    token_logps: Tensor
    stats: TokenStats | None
    pair_weights: Tensor | None = None

    def __repr__(self) -> str:
        return _row(
            "PairLossOutput",
            self._asdict(),
            loss=_mean(self.loss),
            mean_margin=_margin(self.policy),
        )
