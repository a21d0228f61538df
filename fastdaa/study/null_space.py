"""Three responses, one contradiction: a preference loss does not see mass outside its pairs.

The data are ``y1 > y2`` and ``y2 > y1``, so every policy with equal log-ratios on y1 and y2 has the
least possible loss, ln 2 for DPO, wherever it puts the rest of its mass, up to all of it on y3
(Rafailov et al., arXiv 2406.02900, section 4: the matrix of pairs has a null space).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdaa.losses import Objective
from fastdaa.outputs import PairLogps

PAIRS = ((0, 1), (1, 0))
"""(chosen, rejected), by number of the response."""
VANISHING = 1e-12
"""A probability of 0 has no logarithm; this stands for it."""

POLICIES: dict[str, tuple[float, float, float]] = {
    "all mass in the data": (0.5 - VANISHING / 2, 0.5 - VANISHING / 2, VANISHING),
    "uniform": (1 / 3, 1 / 3, 1 / 3),
    "all mass outside the data": (VANISHING, VANISHING, 1 - 2 * VANISHING),
    "one of the two preferred": (0.6, 0.3, 0.1),
}


def null_space(loss: str = "dpo", beta: float = 0.1) -> dict[str, Any]:
    """Losses of the policies, and the dimension of what the pairs cannot see.

    Returns:
        ``{"loss", "beta", "expected": ln 2 for DPO else None, "policies": [{"name",
        "probabilities", "loss", "outside"}], "responses": 3, "rank": 1, "null_space": 2,
        "equal": bool, "higher": bool}``. One of the null space's dimensions is the normalisation.
        ``equal``: the first three policies have the same loss to 1e-9; ``higher``: the last one
        has a larger loss.
    """
    objective = Objective.parse(loss, beta=beta)
    reference = torch.full((3,), 1 / 3, dtype=torch.float64)
    losses = [
        policy_loss(objective, torch.tensor(probabilities, dtype=torch.float64), reference)
        for probabilities in POLICIES.values()
    ]
    policies = [
        {"name": name, "probabilities": list(values), "loss": value, "outside": values[2]}
        for (name, values), value in zip(POLICIES.items(), losses, strict=True)
    ]
    rank = int(torch.linalg.matrix_rank(pair_matrix(PAIRS, 3)))
    *level, last = losses
    return {
        "loss": loss,
        "beta": beta,
        "expected": math.log(2) if loss == "dpo" else None,
        "policies": policies,
        "responses": 3,
        "rank": rank,
        "null_space": 3 - rank,
        "equal": max(level) - min(level) < 1e-9,
        "higher": last > max(level) + 1e-9,
    }


def policy_loss(objective: Objective, policy: Tensor, reference: Tensor) -> float:
    """Mean loss of :data:`PAIRS` for probabilities ``[3]`` fp64."""
    chosen, rejected = (torch.tensor(side) for side in zip(*PAIRS, strict=True))
    lengths = torch.ones(len(PAIRS), dtype=torch.int64)

    def logps(probabilities: Tensor) -> PairLogps:
        values = probabilities.log()
        return PairLogps(values[chosen], values[rejected], lengths, lengths)

    return float(objective(logps(policy), logps(reference)).mean())


def pair_matrix(pairs: Sequence[tuple[int, int]], responses: int) -> Tensor:
    """``[pairs, responses]``: +1 at the chosen and -1 at the rejected response of every pair.

    A loss of margins sees the log-ratios only through this matrix.
    """
    matrix = torch.zeros(len(pairs), responses, dtype=torch.float64)
    for row, (chosen, rejected) in enumerate(pairs):
        matrix[row, chosen] += 1
        matrix[row, rejected] -= 1
    return matrix
