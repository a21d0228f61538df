"""How many completions are desirable, and what that means for a loss: said before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastdaa.losses.unpaired import UnpairedObjective

logger = logging.getLogger(__name__)
_MOST_RATIO = 1.334
"""Of weights times numbers of desirable to undesirable completions, as TRL 1.16 advises it."""


def check_labels(
    labels: Sequence[bool], objective: UnpairedObjective, name: str, *, say: bool
) -> None:
    """Log how many completions there are of each label, and KTO's advice where they are unequal.

    Args:
        name: of the dataset.
        say: whether this process logs.

    Raises:
        ValueError: all labels are the same, and the loss compares with the mean of rewards.
    """
    good, bad = sum(labels), len(labels) - sum(labels)
    said = f"{good:,} desirable and {bad:,} undesirable completions"
    if not (good and bad):
        problem = f"{name}: expected completions of both labels, got {said}"
        if objective.loss.baseline == "rewards":
            raise ValueError(
                f"{problem}; {objective.loss.name} tells them apart around their mean reward"
            )
        if say:
            logger.warning("%s; nothing but the reference holds the policy back", problem)
        return
    if say:
        logger.info("%s: %s%s", name, said, _advice(good, bad, objective))


def _advice(good: int, bad: int, objective: UnpairedObjective) -> str:
    """What to do about unequal numbers; nothing where a label was left out by its weight."""
    values = objective.term.values
    weights = values["desirable_weight"], values["undesirable_weight"]
    if objective.loss.name != "kto" or not all(weights):
        return ""
    ratio = weights[0] * good / (weights[1] * bad)
    if 1 <= round(ratio, 3) <= _MOST_RATIO:
        return ""
    return (
        f"; times their weights {ratio:.3g} : 1, where 1 to 4/3 : 1 is advised, as with "
        f"desirable_weight {weights[1] * bad / good:.3g}"
    )
