"""The papers' claims, each judged from what a study measured; nothing here is a fixed answer.

The claims are those of Rafailov et al., "Scaling Laws for Reward Model Overoptimization in Direct
Alignment Algorithms" (arXiv 2406.02900). What counts as reproduced is said at each judge.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from fastdaa.study import claims_curves as curves
from fastdaa.study import claims_models as models
from fastdaa.study.results import Results
from fastdaa.study.verdicts import Claim, Verdict

CLAIMS = (
    Claim(
        "hump",
        "Quality rises and then falls with KL, for every loss (figure 1).",
        curves.judge_hump,
    ),
    Claim("ipo_kl", "IPO stays nearest at equal beta (figure 1).", curves.judge_ipo_kl),
    Claim("ipo_fall", "IPO over-optimises least (figure 1).", curves.judge_ipo_fall),
    Claim(
        "same_peak",
        "The losses share one frontier: they are best at a similar √KL (figure 1).",
        curves.judge_same_peak,
    ),
    Claim(
        "log_better",
        "The law d (alpha - beta log d), d = √KL, fits better than a quadratic in KL "
        "(section 3.2).",
        models.judge_log_better,
    ),
    Claim(
        "half_rmse", "Its error is half of the quadratic's (section 3.2).", models.judge_half_rmse
    ),
    Claim(
        "d_quadratic",
        "A quadratic in √KL fits about as well as the law.",
        models.judge_d_quadratic,
    ),
    Claim(
        "early_peak",
        "Wide runs are at their best before the end of training and then fall while KL rises on "
        "(figure 2).",
        curves.judge_early_peak,
    ),
    Claim(
        "quarter", "That best point is at about 25% of an epoch (figure 2).", curves.judge_quarter
    ),
    Claim(
        "larger_models",
        "Larger models have the better frontier (figure 1).",
        models.judge_larger_models,
    ),
    Claim(
        "length_regularised",
        "Length-regularised DPO moves the frontier but keeps the hump (figure 3).",
        models.judge_length_regularised,
    ),
    Claim(
        "r2_by_size",
        "Length explains more of the implicit reward in smaller models (figure 3).",
        models.judge_r2_by_size,
    ),
    Claim(
        "r2_by_budget",
        "Length explains more of it at smaller KL budgets (figure 3).",
        models.judge_r2_by_budget,
    ),
    Claim(
        "accuracy",
        "Implicit-reward accuracy does not predict quality (figure 4).",
        partial(models.judge_metric, metric="accuracy"),
    ),
    Claim(
        "loss_value",
        "The loss does not predict quality (figure 4).",
        partial(models.judge_metric, metric="loss_value"),
    ),
    Claim(
        "likelihood",
        "Chosen answers become less likely in step with the forward KL (figure 5).",
        models.judge_likelihood,
    ),
    Claim(
        "tree",
        "In the tree problem mass moves outside the data, most at small beta (figures 6 and 7).",
        models.judge_tree,
    ),
    Claim(
        "null_space",
        "The loss does not see mass outside its pairs (section 4, three responses).",
        models.judge_null_space,
    ),
)


class Judged(NamedTuple):
    """One line of the report's table of claims."""

    name: str
    paper: str
    measured: str
    verdict: Verdict


def judge_claims(results: Results) -> list[Judged]:
    """Every claim in the papers' order, those without data too."""
    return [Judged(claim.name, claim.paper, *claim.judge(results)) for claim in CLAIMS]
