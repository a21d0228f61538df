"""Losses of single completions that are labelled desirable or undesirable, and their table.

``r`` is the log-ratio of a completion, ``log policy - log reference`` summed over its tokens, in
nats. Every function maps log-ratios ``[S]``, labels ``[S]`` (bool) and a baseline (a scalar, a
constant for the gradient) to losses ``[S]``, unreduced, in the dtype of the log-ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdaa.losses.elementary import sigmoid
from fastdaa.losses.objective import Term
from fastdaa.losses.registry import Loss


def kto(
    logratios: Tensor,
    labels: Tensor,
    baseline: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (arXiv 2402.01306, eq. 7 and 8): ``w_d sigmoid(-beta (r - z0))`` of a desirable
    completion, ``w_u sigmoid(beta (r - z0))`` of an undesirable one.

    ``z0`` is ``baseline``, in nats: the KL of the policy to the reference, at least 0.
    """
    signed = _signed(beta * (logratios - baseline), labels)
    return _weighted(sigmoid(-signed), labels, desirable_weight, undesirable_weight)


def bco(
    logratios: Tensor,
    labels: Tensor,
    baseline: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """BCO (arXiv 2404.04656): ``-w_d log sigmoid(beta r - delta)`` of a desirable completion,
    ``-w_u log sigmoid(delta - beta r)`` of an undesirable one.

    ``delta`` is ``baseline``, in units of the reward ``beta r``: its mean so far.
    """
    signed = _signed(beta * logratios - baseline, labels)
    return _weighted(-F.logsigmoid(signed), labels, desirable_weight, undesirable_weight)


def apo_zero(
    logratios: Tensor,
    labels: Tensor,
    baseline: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7), a completion at a time: :func:`kto` with ``z0 = 0``."""
    signed = _signed(beta * logratios, labels)
    return _weighted(sigmoid(-signed), labels, desirable_weight, undesirable_weight)


@dataclass(frozen=True)
class UnpairedLoss(Loss):
    """A loss of labelled completions; ``fn(logratios, labels, baseline, *, <hyperparameters>)``."""

    level: Literal["pair", "token", "unpaired"] = "unpaired"
    baseline: Literal["none", "kl", "rewards"] = "none"
    """What it compares with: the KL on mismatched completions, or the mean of rewards so far."""


_TABLE = (
    UnpairedLoss(
        "kto",
        kto,
        "Ethayarajh et al., KTO, arXiv 2402.01306",
        "each completion against a KL baseline from mismatched ones",
        baseline="kl",
    ),
    UnpairedLoss(
        "bco",
        bco,
        "Jung et al., Binary Classifier Optimization, arXiv 2404.04656",
        "binary classification of completions around their mean reward",
        baseline="rewards",
    ),
    UnpairedLoss(
        "apo_zero",
        apo_zero,
        "D'Oosterlinck et al., Anchored Preference Optimization, arXiv 2408.06266",
        "raises desirable completions, lowers undesirable ones",
    ),
)
UNPAIRED_LOSSES: dict[str, UnpairedLoss] = {loss.name: loss for loss in _TABLE}
UNPAIRED_ALIASES = {"apo_zero_unpaired": "apo_zero"}
"""Names of TRL's."""


@dataclass(frozen=True)
class UnpairedObjective:
    """One loss of labelled completions, with its hyperparameters; ``str`` shows it.

    It has what model cards and trainers ask an :class:`~fastdaa.losses.Objective`.

    Raises:
        ValueError: hyperparameters that the loss cannot take.
    """

    loss: UnpairedLoss
    term: Term = field(repr=False)

    ld_alpha = None
    use_weighting = False
    needs_ref = True
    needs_ref_tokens = False

    @classmethod
    def parse(
        cls,
        losses: str | Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        **hyperparameters: Any,
    ) -> UnpairedObjective:
        """The objective of one name; hyperparameters of None mean the loss's own defaults.

        Raises:
            ValueError: another loss, several, weights, or hyperparameters that it does not have.
        """
        names = [losses] if isinstance(losses, str) else list(losses)
        listed = f"one of {', '.join(UNPAIRED_LOSSES)} with unpaired data"
        if len(names) != 1 or weights is not None:
            got = " ".join(map(str, names)) + ("" if weights is None else " with loss_weights")
            raise ValueError(f"loss_type: expected {listed}, without a mixture, got {got}")
        loss = UNPAIRED_LOSSES.get(UNPAIRED_ALIASES.get(names[0], names[0]))
        if loss is None:
            raise ValueError(f"loss_type: expected {listed}, got {names[0]!r}")
        for name in ("ld_alpha", "use_weighting"):
            if hyperparameters.pop(name, None):
                raise ValueError(f"{name}: expected none with unpaired data, it is for pairs")
        given = {name: value for name, value in hyperparameters.items() if value is not None}
        return cls(loss, Term(loss, 1.0, given))

    @property
    def terms(self) -> tuple[Term, ...]:
        """The loss, as one of a mixture."""
        return (self.term,)

    @property
    def beta(self) -> float:
        """Scale of the rewards."""
        return float(self.term.values["beta"])

    def __call__(self, logratios: Tensor, labels: Tensor, baseline: Tensor) -> Tensor:
        """Losses ``[S]`` of completions; see the module."""
        return self.loss.fn(logratios, labels, baseline, **self.term.values)

    def __str__(self) -> str:
        return f"{self.term} on unpaired data"


def takes_unpaired(names: str | Sequence[str]) -> bool:
    """Whether all of these are names of losses that labelled completions can be trained with."""
    listed = [names] if isinstance(names, str) else list(names)
    return all(name in UNPAIRED_LOSSES or name in UNPAIRED_ALIASES for name in listed)


def _signed(x: Tensor, labels: Tensor) -> Tensor:
    """``x`` of desirable completions, ``-x`` of the others."""
    return torch.where(labels, x, -x)


def _weighted(losses: Tensor, labels: Tensor, desirable: float, undesirable: float) -> Tensor:
    return torch.where(labels, desirable * losses, undesirable * losses)
