"""An ``Objective`` evaluated by the Triton kernel: sums, losses, coefficients and metrics at once.

The formulas are those of ``fastdaa.losses`` a second time, as jitted functions with derivatives;
``tests/test_kernels_objective.py`` holds them to the first for every loss of the registry. The
single pass calls this where the engine is Triton; it has not run on a GPU yet.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdaa.kernels.objective import PairValues, evaluate_pairs, evaluate_tokens
from fastdaa.kernels.objective_functions import PAIR_OBJECTIVES, TOKEN_OBJECTIVES
from fastdaa.losses import LOSSES, Objective, Term
from fastdaa.losses.custom import is_custom
from fastdaa.losses.hyperparameters import check_advantages
from fastdaa.losses.margin import divergence_alpha
from fastdaa.outputs import BatchTotals

_NAME_OF = {loss.fn: name for name, loss in LOSSES.items()}
# Members of the daa family, with the hyperparameters that make them what they are.
_DAA = {
    "logistic": ("dpo", {"label_smoothing": 0.0, "length_alpha": 0.0}),
    "squared": ("ipo_unified", {}),
    "hinge": ("slic", {"delta": 1.0}),
    "truncated_quadratic": ("truncated_quadratic", {}),
    "exponential": ("exponential", {}),
    "savage": ("savage", {}),
}


def evaluate_objective(
    objective: Objective,
    token_logps: Tensor,  # [N]
    lengths: Tensor,  # [2B] int64
    *,
    totals: BatchTotals,
    ref_logps: Tensor | None = None,  # [2B]
    ref_token_logps: Tensor | None = None,  # [N]
    completion_lengths: Tensor | None = None,  # [2B] int64
    advantages: Tensor | None = None,  # [2B]
) -> PairValues:
    """Losses and coefficients of ``B`` pair-major pairs, one launch a term of the objective.

    Args:
        token_logps: fp32, sequence by sequence, no gradient.
        lengths: scored tokens of each sequence.
        totals: sizes of the whole batch, as in :func:`fastdaa.pair_loss`.
        ref_logps, ref_token_logps: fp32 references; the first one is summed from the second where
            only that is given.
        completion_lengths: divisors of per-token means; None for ``lengths``.
        advantages: for token-level terms, and an error without one; None for +1 and -1.

    Returns:
        Losses before the mean over pairs and their derivatives by sequence and by token. With
        token-level terms there are no coefficients of sequences.

    Raises:
        ValueError: a term that couples the batch or has a function of the caller, a missing
            reference, advantages that no term reads, or tensors that do not fit together.
    """
    check_advantages(advantages, objective)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    parts = []
    for term in objective.terms:
        if term.loss.level == "token":
            values = _token_term(term, objective, token_logps, offsets, totals, ref_token_logps,
                                 advantages)  # fmt: skip
        else:
            per_token = ref_token_logps if ref_logps is None else None
            values = _pair_term(term, objective, token_logps, offsets, totals, ref_logps, per_token,
                                completion_lengths)  # fmt: skip
        parts.append((term.weight, values))
    first = parts[0][1]
    if len(parts) == 1 and parts[0][0] == 1:
        return first
    pair_level = not objective.has_token_level
    return first._replace(
        losses=_weighted_sum([(w, v.losses) for w, v in parts]),
        coefficients=_weighted_sum([(w, v.coefficients) for w, v in parts]) if pair_level else None,
        token_coefficients=_weighted_sum([(w, v.token_coefficients) for w, v in parts]),
    )


def has_kernel(objective: Objective) -> bool:
    """Whether every term has a jitted formula: none couples the batch or has a function of the
    caller's."""
    for term in objective.terms:
        if term.loss.level == "token":
            if _name(term) not in TOKEN_OBJECTIVES:
                return False
            continue
        try:
            _jitted(term)
        except ValueError:
            return False
    return True


def _weighted_sum(parts: list[tuple[float, Tensor | None]]) -> Tensor:
    total = torch.zeros_like(parts[0][1])  # type: ignore[arg-type]
    for weight, values in parts:
        assert values is not None
        total.add_(values, alpha=weight)
    return total


def _pair_term(
    term: Term,
    objective: Objective,
    token_logps: Tensor,
    offsets: Tensor,
    totals: BatchTotals,
    ref_logps: Tensor | None,
    ref_token_logps: Tensor | None,
    completion_lengths: Tensor | None,
) -> PairValues:
    name, values = _jitted(term)
    jitted = PAIR_OBJECTIVES[name]
    return evaluate_pairs(
        jitted.fn, token_logps, offsets, ref_logps=ref_logps, ref_token_logps=ref_token_logps,
        completion_lengths=completion_lengths,
        parameters=tuple(values[p] for p in jitted.parameters),
        needs_ref=jitted.needs_ref, length_norm=bool(values.get("length_norm", False)),
        likelihood=totals.pairs / max(totals.chosen_tokens, 1), reward_scale=objective.beta,
        token_coefficients=True,
    )  # fmt: skip


def _token_term(
    term: Term,
    objective: Objective,
    token_logps: Tensor,
    offsets: Tensor,
    totals: BatchTotals,
    ref_token_logps: Tensor | None,
    advantages: Tensor | None,
) -> PairValues:
    fn, parameters, needs_ref = TOKEN_OBJECTIVES[_name(term)]
    if needs_ref and ref_token_logps is None:
        raise ValueError(f"ref_token_logps: expected [{token_logps.numel()}] for {term}, got None")
    values = dict(term.values)
    if "max_weight" in values:
        values["log_max_weight"] = math.log(values["max_weight"])
    tokens = totals.tokens or token_logps.numel()
    return evaluate_tokens(
        fn, token_logps, offsets, ref_token_logps=ref_token_logps, advantages=advantages,
        parameters=tuple(values[p] for p in parameters),
        weight=totals.pairs / max(tokens, 1), reward_scale=objective.beta,
    )  # fmt: skip


def _name(term: Term) -> str:
    """The registry's name of a term, also where it was asked for by an alias; none for a function
    of the caller's."""
    return "" if is_custom(term.loss) else _NAME_OF[getattr(term.loss.fn, "func", term.loss.fn)]


def _jitted(term: Term) -> tuple[str, dict]:
    """Name in ``PAIR_OBJECTIVES`` and hyperparameters of a pair-level term."""
    name, values = _name(term), dict(term.values)
    if name == "ipo" and values["target"] == "unified":
        name = "ipo_unified"
    if name == "f_dpo":
        name, values = _f_dpo(values)
    if name == "daa" and isinstance(values["g"], str):
        name, fixed = _DAA[values["g"]]
        values |= fixed
    if name not in PAIR_OBJECTIVES:
        raise ValueError(
            f"expected objectives of one pair with a jitted formula "
            f"({', '.join(PAIR_OBJECTIVES)}), got {term}"
        )
    return name, values


def _f_dpo(values: dict) -> tuple[str, dict]:
    alpha = divergence_alpha(values["f_divergence_type"], values["f_alpha_divergence_coef"])
    if alpha == 1:
        return "dpo", {"beta": values["beta"], "label_smoothing": 0.0, "length_alpha": 0.0}
    if alpha is None:
        return "f_dpo_js", values
    return "f_dpo_alpha", values | {"exponent": alpha - 1}
