"""The columns of a study's table, and the checks of one row.

Required in every row:

- ``run`` (text) and ``checkpoint`` (whole number, the optimiser step): together they name the row;
- ``kl``: KL(policy || reference) in nats a sequence;
- ``score``: quality in any unit, higher is better.

Optional, absent or null where unknown: :data:`OPTIONAL`. Further columns are kept as they are.
Every number has to be finite: what could not be measured is null, not NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
REQUIRED = ("run", "checkpoint", "kl", "score")

OPTIONAL: dict[str, str] = {
    "preset": "label: the world's preset",
    "size": "label: the model's size",
    "algorithm": "label: e.g. daa, apa, ppo, best_of_n",
    "loss": "label: e.g. dpo, ipo, slic",
    "beta": "strength of the KL term of the loss",
    "length_alpha": "R-DPO's length weight",
    "seed": "whole number: the run's random seed",
    "lr": "peak learning rate",
    "fraction": "part of the training that was done, 0 to 1",
    "final": "whether this is the run's last checkpoint",
    "gold": "mean gold reward, the reference at 0, its standard deviation 1",
    "win_rate": "P(policy's answer beats the reference's, or the data's under a judge), ties 1/2",
    "kl_forward": "KL(reference || policy), nats a sequence",
    "entropy": "entropy of the policy, nats a sequence",
    "length": "mean length of an answer, tokens",
    "violations": "mean number of rule violations an answer",
    "max_prob": "largest probability of one answer, mean over prompts",
    "accuracy": "implicit-reward accuracy on held-out pairs",
    "loss_value": "mean loss on held-out pairs",
    "chosen_logratio": "mean log(policy / reference) of held-out chosen answers, nats",
    "rejected_logratio": "the same of rejected answers",
    "margin": "chosen_logratio - rejected_logratio",
    "length_r2_pairs": "R^2 of log-ratio on length, held-out pairs",
    "length_r2_samples": "R^2 of log-ratio on length, the policy's own samples",
    "kl_k1": "Monte Carlo estimate of kl: mean log-ratio of samples",
    "kl_k1_stderr": "its standard error",
    "kl_rb": "estimate of kl with the exact divergence at every sampled token",
    "kl_rb_stderr": "its standard error",
    "seconds": "time since the run began",
}
"""Optional columns and what they hold: numbers, unless said otherwise."""

LABELS = ("preset", "size", "algorithm", "loss")
WHOLE = ("checkpoint", "seed")
NUMBERS = frozenset(
    name
    for name in (*REQUIRED, *OPTIONAL)
    if name != "run" and name != "final" and name not in LABELS
)

KL_TOLERANCE = 1e-2
"""How far below zero an estimated KL may lie, in nats; four standard errors where ``kl_k1_stderr``
is larger. A KL divergence is never negative, but its k1 estimate can be."""


def check_row(row: Mapping[str, Any], where: str = "row") -> Row:
    """The row with known columns in their types.

    Raises:
        ValueError: a required value that is missing, or one that cannot be; it starts with
            ``where``.
    """
    checked: Row = dict(row)
    for name in REQUIRED:
        if checked.get(name) is None:
            given = "none" if name in checked else f"the columns {', '.join(checked) or 'none'}"
            raise ValueError(
                f"{where}: expected a value for {name} (required: {', '.join(REQUIRED)}), "
                f"got {given}"
            )
    if isinstance(checked["run"], int) and not isinstance(checked["run"], bool):
        checked["run"] = str(checked["run"])
    if not isinstance(checked["run"], str) or not checked["run"]:
        raise ValueError(f"{where}: expected run to be text, got {checked['run']!r}")
    for name, value in checked.items():
        if value is None:
            continue
        if name in NUMBERS:
            checked[name] = _checked_number(name, value, where)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: expected {name} to be finite or null, got {value}")
    final = checked.get("final")
    if final is not None and not isinstance(final, bool):
        raise ValueError(f"{where}: expected final to be true or false, got {final!r}")
    _check_kl(checked, where)
    return checked


def _check_kl(row: Row, where: str) -> None:
    tolerance = max(KL_TOLERANCE, 4 * (row.get("kl_k1_stderr") or 0.0))
    if row["kl"] < -tolerance:
        raise ValueError(
            f"{where}: expected kl (nats a sequence) to be at least 0, or an estimate within "
            f"{tolerance:.2g} of it, got {row['kl']:g}"
        )


def _checked_number(name: str, value: Any, where: str) -> float | int:
    if not is_number(value):
        raise ValueError(f"{where}: expected {name} to be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{where}: expected {name} to be finite, got {value}")
    if name not in WHOLE:
        return float(value)
    if value != int(value) or value < 0:
        raise ValueError(f"{where}: expected {name} to be a whole number, got {value!r}")
    return int(value)


def is_number(value: Any) -> bool:
    """Whether a cell is a number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
