"""Which values the hyperparameters may take, and which loss takes which."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any

from fastdaa.losses.custom import is_custom
from fastdaa.losses.margin import F_DIVERGENCES, MARGIN_FUNCTIONS
from fastdaa.losses.registry import LOSSES, Loss
from fastdaa.validation import shown

_Range = tuple[Callable[[float], bool], str]
_POSITIVE: _Range = (lambda v: v > 0, "> 0")
_NOT_NEGATIVE: _Range = (lambda v: v >= 0, ">= 0")

_RANGES: dict[str, _Range] = {
    "beta": _POSITIVE,
    "label_smoothing": (lambda v: 0 <= v < 0.5, "in [0, 0.5)"),
    "exo_pair.label_smoothing": (lambda v: 0 < v < 0.5, "in (0, 0.5)"),
    "delta": _NOT_NEGATIVE,
    "regularization": _NOT_NEGATIVE,
    "gamma": _NOT_NEGATIVE,
    "nll_weight": _NOT_NEGATIVE,
    "desirable_weight": _NOT_NEGATIVE,
    "undesirable_weight": _NOT_NEGATIVE,
    "discopop_tau": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "lam": _POSITIVE,
    "max_weight": _POSITIVE,
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "target": ("standard", "unified"),
    "f_divergence_type": F_DIVERGENCES,
    "g": tuple(MARGIN_FUNCTIONS),
}


def plain_number(value: Any) -> Any:
    """A number of NumPy as a float, everything else as it is."""
    own = isinstance(value, (bool, int, float)) or not isinstance(value, Real)
    return value if own else float(value)


def listed_weights(weights: Any) -> list[Any]:
    """The weights of a mixture as a list; raises ``TypeError`` for what has no order or none."""
    listed = weights.tolist() if hasattr(weights, "tolist") else weights
    if isinstance(listed, (str, Mapping, Set)) or not isinstance(listed, Iterable):
        raise TypeError(f"weights: expected a list of numbers, got {shown(weights)}")
    return list(listed)


def checked_weight(loss: Loss, weight: Any) -> float:
    """The weight of a loss; raises ``TypeError`` for no number, ``ValueError`` out of range."""
    weight = plain_number(weight)
    if not isinstance(weight, (int, float)) or isinstance(weight, bool):
        raise TypeError(f"expected a number as weight of {loss.name}, got {shown(weight)}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"expected a finite weight >= 0 for {loss.name}, got {weight!r}")
    return weight


def check_accepted(losses: Sequence[Loss], given: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a given hyperparameter belongs to none of ``losses``.

    Values of None count as not given, but their names still have to exist.
    """
    for name, value in given.items():
        if any(name in loss.hyperparameters for loss in losses):
            continue
        takers = [loss.name for loss in LOSSES.values() if name in loss.hyperparameters]
        if takers and value is None:
            continue
        accepted = "; ".join(
            f"{loss.name} takes {', '.join(loss.hyperparameters) or 'none'}" for loss in losses
        )
        whose = f"{name} belongs to {', '.join(takers)}" if takers else f"no loss has {name}"
        raise ValueError(f"got {name}={value!r}, which no chosen loss uses: {accepted}; {whose}")


def check_value(loss: Loss, name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` fits the hyperparameter ``name`` of ``loss``."""
    default = loss.hyperparameters[name]
    if isinstance(default, bool):
        valid, expected = isinstance(value, bool), "True or False"
    elif isinstance(default, str):
        choices = _CHOICES[name]
        valid, expected = value in choices, f"one of {', '.join(choices)}"
        if name == "g":
            pair = isinstance(value, tuple) and len(value) == 2 and all(map(callable, value))
            valid = valid or pair
            expected += " or a pair (value, derivative) of callables"
    else:
        unbounded: _Range = (lambda v: True, "finite")
        in_range, words = _RANGES.get(f"{loss.name}.{name}") or _RANGES.get(name, unbounded)
        if is_custom(loss):
            in_range, words = unbounded
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        valid = number and math.isfinite(value) and in_range(value)
        expected = f"a finite number {words}" if words != "finite" else "a finite number"
    if not valid:
        raise ValueError(f"expected {name} of {loss.name} to be {expected}, got {value!r}")


def check_advantages(advantages: object, objective: Any) -> None:
    """Raise ``ValueError`` for advantages beside an objective that reads none.

    What has been given for a purpose would change nothing. A reference that no loss reads is let
    through, since callers have one whatever they minimise.
    """
    if advantages is not None and not objective.has_token_level:
        readers = ", ".join(name for name, loss in LOSSES.items() if loss.level == "token")
        raise ValueError(
            f"advantages: expected None for {objective}, which does not read them, got some; "
            f"{readers} do"
        )


def check_weighting(losses: Sequence[Loss], ld_alpha: object, use_weighting: object) -> None:
    """Raise ``ValueError`` unless the weightings of an objective have a meaning for ``losses``."""
    names = ", ".join(dict.fromkeys(loss.name for loss in losses))
    if ld_alpha is not None:
        number = isinstance(ld_alpha, Real) and not isinstance(ld_alpha, bool)
        if not number or not 0 <= ld_alpha <= 1:  # type: ignore[operator]
            raise ValueError(f"ld_alpha: expected a number in [0, 1] or None, got {ld_alpha!r}")
        if not any(loss.level == "pair" and loss.needs_ref for loss in losses):
            raise ValueError(
                "ld_alpha: expected a loss that compares the log-probs of sequences with a "
                f"reference, got {names}"
            )
    if not isinstance(use_weighting, bool):
        raise ValueError(f"use_weighting: expected True or False, got {use_weighting!r}")
    ranked = [loss.name for loss in losses if loss.ranked]
    if use_weighting and ranked:
        raise ValueError(
            f"use_weighting: expected losses of single pairs, got {', '.join(ranked)}, which sorts "
            "the pairs of a batch, so that no loss belongs to a pair that could be weighted"
        )
