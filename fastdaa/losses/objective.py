"""Weighted mixtures of losses, with their hyperparameters checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import reduce
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastdaa.losses.custom import is_custom
from fastdaa.losses.hyperparameters import (
    check_accepted,
    check_value,
    check_weighting,
    checked_weight,
    listed_weights,
    plain_number,
)
from fastdaa.losses.registry import Loss, get_loss
from fastdaa.outputs import BatchTotals, PairLogps

_BY_KEY: dict[str, Objective] = {}
_OWN: WeakValueDictionary[str, Objective] = WeakValueDictionary()
"""Those with a function of the caller's, as long as somebody holds them."""
_COUNT = count()
_PLAIN = (str, int, float, type(None))


def _register(objective: Objective) -> str:
    """A key that equal objectives share; one with a function of the caller's has its own."""
    key = str(objective)
    values = (value for term in objective.terms for value in term.values.values())
    plain = all(isinstance(value, _PLAIN) for value in values)
    if not plain or any(is_custom(term.loss) for term in objective.terms):
        key = f"{key} #{next(_COUNT)}"
        _OWN[key] = objective
    else:
        _BY_KEY[key] = objective
    return key


@dataclass(frozen=True)
class Term:
    """One loss of a mixture.

    Raises:
        TypeError: a weight that is no number.
        ValueError: a weight below 0 or not finite, hyperparameters that the loss cannot take.
    """

    loss: Loss
    weight: float = 1.0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    """Values that differ from the defaults, or all of them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", checked_weight(self.loss, self.weight))
        values = {name: plain_number(value) for name, value in self.hyperparameters.items()}
        object.__setattr__(self, "hyperparameters", values)
        check_accepted([self.loss], self.hyperparameters)
        for name, value in self.hyperparameters.items():
            check_value(self.loss, name, value)

    @property
    def values(self) -> dict[str, Any]:
        """Every hyperparameter with its value, defaults included."""
        return {**self.loss.hyperparameters, **self.hyperparameters}

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.values.items())
        weight = "" if self.weight == 1 else f"{self.weight} * "
        return f"{weight}{self.loss.name}({values})"


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses; ``str`` shows it with every value.

    The loss of a batch is the mean of the returned vector over all pairs of the batch. Chunks of
    the batch may be evaluated one at a time if the objective is not ``coupled``: give ``totals`` of
    the whole batch, sum what comes back, and divide by the pairs of the whole batch.

    Raises:
        TypeError: what is no tuple of terms, such as the name of a loss, which :meth:`parse` takes.
        ValueError: no loss with a weight above 0, or a weighting that does not go with the losses.
    """

    terms: tuple[Term, ...]
    ld_alpha: float | None = None
    """LD-DPO (arXiv 2409.06411): what a token beyond the length of the shorter completion counts,
    in [0, 1], in losses of sequences that read a reference; None for 1, without a token's
    reference log-prob having to be known."""
    use_weighting: bool = False
    """WPO (arXiv 2406.11827): each pair's loss is multiplied by
    :func:`fastdaa.losses.weights.on_policy_weights`."""
    key: str = field(init=False, repr=False, compare=False)
    """Name under which :meth:`by_key` finds it: compiled graphs hold strings, not objects."""

    def __post_init__(self) -> None:
        if not isinstance(self.terms, tuple) or not all(isinstance(t, Term) for t in self.terms):
            raise TypeError(
                f"terms: expected a tuple of Terms, got {self.terms!r}; "
                "Objective.parse reads names of losses"
            )
        if not self.terms or all(term.weight == 0 for term in self.terms):
            raise ValueError("expected at least one loss with a weight above 0, got none")
        check_weighting([term.loss for term in self.terms], self.ld_alpha, self.use_weighting)
        if self.ld_alpha is not None:
            object.__setattr__(self, "ld_alpha", float(self.ld_alpha))
        object.__setattr__(self, "key", _register(self))

    def __hash__(self) -> int:
        return hash(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew, so that another process registers it, too.
        return type(self), (self.terms, self.ld_alpha, self.use_weighting)

    @staticmethod
    def by_key(key: str) -> Objective:
        """The objective that has this ``key``."""
        found = _BY_KEY.get(key)
        return _OWN[key] if found is None else found

    @classmethod
    def parse(
        cls,
        losses: str | Loss | Sequence[str | Loss],
        *,
        weights: Sequence[float] | None = None,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        **hyperparameters: Any,
    ) -> Objective:
        """Build a mixture from names, aliases, or losses of :func:`fastdaa.losses.custom_loss`.

        Each hyperparameter goes to every chosen loss that has it; a value of None means the loss's
        own default. Weights default to 1. ``ld_alpha`` and ``use_weighting`` are those of the
        class. Raises ``ValueError`` for unknown losses, for hyperparameters that no chosen loss
        uses, and for values out of range, ``TypeError`` for no list or no numbers.
        """
        asked: object = losses
        if not isinstance(asked, (str, Loss, Iterable)) or isinstance(asked, (Mapping, Set)):
            hint = "; weights are given by weights=[...]" if isinstance(asked, Mapping) else ""
            raise TypeError(
                f"losses: expected names or custom_loss(...), got {type(asked).__name__}{hint}"
            )
        names = [losses] if isinstance(losses, (str, Loss)) else list(losses)
        weights = [1.0] * len(names) if weights is None else listed_weights(weights)
        if len(weights) != len(names):
            shown = ", ".join(str(getattr(name, "name", name)) for name in names)
            raise ValueError(f"weights: expected one a loss ({shown}), got {len(weights)}")
        chosen = [name if isinstance(name, Loss) else get_loss(name) for name in names]
        check_accepted(chosen, hyperparameters)
        given = {name: value for name, value in hyperparameters.items() if value is not None}
        terms = (
            Term(loss, weight, {k: v for k, v in given.items() if k in loss.hyperparameters})
            for loss, weight in zip(chosen, weights, strict=True)
        )
        return cls(tuple(terms), ld_alpha, use_weighting)

    @property
    def pair_terms(self) -> tuple[Term, ...]:
        """Terms of sequence log-probabilities."""
        return tuple(term for term in self.terms if term.loss.level == "pair")

    @property
    def token_terms(self) -> tuple[Term, ...]:
        """Terms of token log-probabilities."""
        return tuple(term for term in self.terms if term.loss.level == "token")

    @property
    def needs_ref(self) -> bool:
        """Whether any term reads a reference."""
        return any(term.loss.needs_ref for term in self.terms)

    @property
    def coupled(self) -> bool:
        """Whether any term couples the pairs of a batch, so that all must be given at once."""
        return any(term.loss.coupled for term in self.terms)

    @property
    def sparse(self) -> bool:
        """Whether many tokens have a derivative of exactly 0, in every term."""
        return all(
            term.loss.sparse or term.values.get("g") in ("hinge", "truncated_quadratic")
            for term in self.terms
        )

    @property
    def compares_means(self) -> bool:
        """Whether all terms that compare completions compare log-probs per token, of the policy
        alone."""
        comparing = [term.loss.compares_means for term in self.terms if term.loss.name != "sft"]
        return bool(comparing) and all(comparing)

    @property
    def has_token_level(self) -> bool:
        """Whether ``token_losses`` is needed beside the call."""
        return bool(self.token_terms)

    @property
    def needs_ref_tokens(self) -> bool:
        """Whether the sums of a reference are not enough, and log-probs of its tokens are read."""
        return self.ld_alpha is not None or any(term.loss.needs_ref for term in self.token_terms)

    @property
    def beta(self) -> float:
        """Scale of the logged rewards: beta of the first loss that has one, else 1."""
        betas = (term.values["beta"] for term in self.terms if "beta" in term.values)
        return next(betas, 1.0)

    def __call__(
        self,
        policy: PairLogps,
        ref: PairLogps | None,
        totals: BatchTotals | None = None,
        token_losses: Tensor | None = None,
        *,
        unweighted: PairLogps | None = None,
        pair_weights: Tensor | None = None,
    ) -> Tensor:
        """Losses ``[B]`` of the pairs given, in the dtype of the log-probabilities.

        ``totals`` describes the whole batch when these pairs are a chunk of it. An objective with
        token-level terms needs the result of ``token_losses`` for the same pairs, which is added.
        With ``ld_alpha``, the sums of ``policy`` and ``ref`` are those of
        :func:`~fastdaa.losses.weights.desensitized` log-probs, and ``unweighted`` are the policy's
        plain sums, for terms that read no reference. ``pair_weights [B]`` go with
        ``use_weighting``. Raises ``ValueError`` if a reference or one of these is missing or
        superfluous, or if a function of the caller's does not give one loss a pair, ``TypeError``
        if it gives no tensor.
        """
        self._check_given("token_losses", token_losses, self.has_token_level)
        self._check_given("unweighted", unweighted, self.ld_alpha is not None)
        self._check_given("pair_weights", pair_weights, self.use_weighting)
        parts = [] if token_losses is None else [token_losses]
        for term in self.pair_terms:
            _require_ref(term, ref)
            values = {**term.values, "totals": totals} if term.loss.takes_totals else term.values
            plain = unweighted is not None and not term.loss.needs_ref
            losses: object = term.loss.fn(unweighted if plain else policy, ref, **values)
            if not isinstance(losses, Tensor):
                raise TypeError(
                    f"{term.loss.name}: expected a tensor with one loss a pair, got "
                    f"{type(losses).__name__}"
                )
            if losses.shape != policy.chosen.shape:
                raise ValueError(
                    f"{term.loss.name}: expected one loss a pair, {list(policy.chosen.shape)}, "
                    f"got {list(losses.shape)}"
                )
            parts.append(_weighted(term, losses))
        total: Tensor = reduce(torch.add, parts)
        return total if pair_weights is None else total * pair_weights

    def _check_given(self, name: str, given: object, wanted: bool) -> None:
        if wanted != (given is not None):
            named = name if wanted else f"no {name}"
            raise ValueError(f"expected {named} for the objective {self}")

    def token_losses(
        self,
        token_logps: Tensor,  # [n]
        ref_token_logps: Tensor | None,  # [n]
        lengths: Tensor,  # [s] int64
        *,
        advantages: Tensor | None = None,  # [s]
        pairs: int | None = None,
        tokens: int | None = None,
    ) -> Tensor:
        """Token-level part of the losses ``[s / 2]``, of whole pairs in pair-major order.

        ``lengths`` are the scored tokens of each sequence, chosen and rejected in turn. A pair's
        entry is the sum over its tokens times ``pairs / tokens``, so that the mean over the pairs
        of the batch is the mean over its tokens. ``pairs`` and ``tokens`` (scored tokens of both
        sides) count the whole batch when this is a chunk of it; give both or neither.
        Raises ``ValueError`` for an objective without token-level terms or a missing reference.
        """
        if not self.has_token_level:
            raise ValueError(f"expected an objective with token-level losses, got {self}")
        if (pairs is None) != (tokens is None):
            raise ValueError(f"expected pairs and tokens together, got {pairs=}, {tokens=}")
        if pairs is None or tokens is None:
            pairs, tokens = lengths.numel() // 2, token_logps.numel()
        parts = []
        for term in self.token_terms:
            _require_ref(term, ref_token_logps)
            per_token = term.loss.fn(
                token_logps, ref_token_logps, lengths, advantages=advantages, **term.values
            )
            parts.append(_weighted(term, per_token))
        pair_lengths = lengths.view(-1, 2).sum(dim=1)
        # unsafe skips a check of the lengths that would wait for the device.
        sums = torch.segment_reduce(
            reduce(torch.add, parts), "sum", lengths=pair_lengths, unsafe=True
        )
        return sums * pairs / max(tokens, 1)

    def __str__(self) -> str:
        parts = [" + ".join(str(term) for term in self.terms)]
        if self.ld_alpha is not None:
            parts.append(f"ld_alpha={self.ld_alpha}")
        return ", ".join([*parts, "use_weighting"] if self.use_weighting else parts)


def token_means(sums: PairLogps) -> PairLogps:
    """Per-token means in place of the sums; 0 for an empty completion."""
    return sums._replace(
        chosen=sums.chosen / sums.chosen_lengths.clamp(min=1),
        rejected=sums.rejected / sums.rejected_lengths.clamp(min=1),
    )


def implicit_rewards(
    policy: PairLogps, ref: PairLogps | None, beta: float
) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``[B]`` of chosen and rejected, detached: ``beta * (policy - ref)``.

    Without a reference, ``beta * policy``.
    """
    chosen, rejected = policy.chosen.detach(), policy.rejected.detach()
    if ref is not None:
        chosen, rejected = chosen - ref.chosen.detach(), rejected - ref.rejected.detach()
    return beta * chosen, beta * rejected


def _weighted(term: Term, losses: Tensor) -> Tensor:
    return losses if term.weight == 1 else term.weight * losses


def _require_ref(term: Term, ref: Any) -> None:
    if term.loss.needs_ref and ref is None:
        raise ValueError(f"expected reference log-probabilities for {term.loss.name}, got None")
