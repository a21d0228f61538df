"""The table of losses: what each one needs, which hyperparameters it takes, where it is from."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

from torch import Tensor

from fastdaa.losses import completion, coupled, margin, reference_free, token_level


@dataclass(frozen=True)
class Loss:
    """A loss function and what a caller has to know to evaluate it."""

    name: str
    fn: Callable[..., Tensor]
    """Pair level: ``fn(policy, ref, *, <hyperparameters>, [totals])`` gives losses ``[B]``; token
    level: ``fn(token_logps, ref_token_logps, lengths, *, <hyperparameters>, advantages)``, ``[N]``;
    unpaired: see :mod:`fastdaa.losses.unpaired`, which has a table of its own.
    """
    paper: str
    summary: str
    level: Literal["pair", "token", "unpaired"] = "pair"
    needs_ref: bool = True
    """Reads the reference log-probabilities; otherwise they may be None."""
    coupled: bool = False
    """Couples the pairs of a batch, which then cannot be split into chunks."""
    ranked: bool = False
    """Entry i of the losses belongs to rank i of the batch, and to no pair."""
    sparse: bool = False
    """Gives many tokens a derivative of exactly 0: those of satisfied pairs, or of one side."""
    compares_means: bool = False
    """Compares log-probs per token, of the policy alone."""

    @cached_property
    def hyperparameters(self) -> dict[str, Any]:
        """Names and default values of the hyperparameters."""
        return {k: v for k, v in self._keywords.items() if k not in ("totals", "advantages")}

    @property
    def takes_totals(self) -> bool:
        """Whether ``fn`` needs ``BatchTotals`` when it sees only a chunk of the batch."""
        return "totals" in self._keywords

    @cached_property
    def _keywords(self) -> dict[str, Any]:
        parameters = inspect.signature(self.fn).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


_DPO = "Rafailov et al., Direct Preference Optimization, arXiv 2305.18290"
_GPO = "Tang et al., Generalized Preference Optimization, arXiv 2402.05749"
_APO = "D'Oosterlinck et al., Anchored Preference Optimization, arXiv 2408.06266"
_AOT = "Melnyk et al., Distributional Preference Alignment via Optimal Transport, arXiv 2406.05882"
_APA = "Zhu et al., Advantage-Induced Policy Alignment, arXiv 2306.02231"

_TABLE = (
    Loss("dpo", margin.dpo, _DPO, "logistic loss of the margin"),
    Loss(
        "f_dpo",
        margin.f_dpo,
        "Wang et al., Beyond Reverse KL, arXiv 2309.16240",
        "DPO under another divergence from the reference",
    ),
    Loss(
        "robust",
        margin.robust,
        "Chowdhury et al., Provably Robust DPO, arXiv 2403.00409",
        "DPO, unbiased under a known rate of flipped labels",
    ),
    Loss(
        "ipo",
        margin.ipo,
        "Azar et al., A General Theoretical Paradigm (IPO), arXiv 2310.12036",
        "squared distance of the margin to a finite target",
    ),
    Loss(
        "slic",
        margin.slic,
        "Liu et al., Statistical Rejection Sampling (RSO), arXiv 2309.06657",
        "hinge on the reference-normalised margin",
        sparse=True,
    ),
    Loss(
        "slic_hf",
        reference_free.slic_hf,
        "Zhao et al., SLiC-HF, arXiv 2305.10425",
        "reference-free hinge with a likelihood regulariser",
        needs_ref=False,
        sparse=True,
    ),
    Loss(
        "truncated_quadratic",
        margin.truncated_quadratic,
        _GPO,
        "squared hinge of the margin",
        sparse=True,
    ),
    Loss("exponential", margin.exponential, _GPO, "exponential loss of the margin"),
    Loss("savage", margin.savage, _GPO, "bounded, non-convex loss of the margin"),
    Loss(
        "daa",
        margin.daa,
        "Rafailov et al., Scaling Laws for Reward Model Overoptimization in Direct Alignment "
        "Algorithms, arXiv 2406.02900",
        "the family g(beta h) with g given by name or as (value, derivative)",
    ),
    Loss(
        "simpo",
        reference_free.simpo,
        "Meng et al., SimPO, arXiv 2405.14734",
        "length-normalised and reference-free, with a target margin",
        needs_ref=False,
        compares_means=True,
    ),
    Loss(
        "orpo",
        reference_free.orpo,
        "Hong et al., ORPO, arXiv 2403.07691",
        "likelihood plus an odds ratio, no reference",
        needs_ref=False,
        compares_means=True,
    ),
    Loss(
        "cpo",
        reference_free.cpo,
        "Xu et al., Contrastive Preference Optimization, arXiv 2401.08417",
        "DPO with a uniform reference, plus likelihood",
        needs_ref=False,
    ),
    Loss(
        "kto",
        coupled.kto,
        "Ethayarajh et al., KTO, arXiv 2402.01306",
        "each completion against a KL baseline of the batch",
        coupled=True,
    ),
    Loss("apo_zero", completion.apo_zero, _APO, "raises chosen, lowers rejected"),
    Loss("apo_down", completion.apo_down, _APO, "lowers both, rejected more"),
    Loss(
        "exo_pair",
        margin.exo_pair,
        "Ji et al., Towards Efficient Exact Optimization (EXO), arXiv 2402.00856",
        "reverse KL to smoothed preference labels",
    ),
    Loss(
        "nca_pair",
        completion.nca_pair,
        "Chen et al., Noise Contrastive Alignment, arXiv 2402.05369",
        "contrast of each completion with the reference",
    ),
    Loss(
        "bco_pair",
        completion.bco_pair,
        "Jung et al., Binary Classifier Optimization, arXiv 2404.04656",
        "binary classification of each completion",
    ),
    Loss(
        "sppo_hard",
        completion.sppo_hard,
        "Wu et al., Self-Play Preference Optimization, arXiv 2405.00675",
        "both log-ratios regressed to plus and minus 1/(2 beta)",
    ),
    Loss(
        "aot",
        coupled.aot,
        _AOT,
        "sorted policy margins above sorted ref margins",
        coupled=True,
        ranked=True,
    ),
    Loss(
        "aot_unpaired",
        coupled.aot_unpaired,
        _AOT,
        "sorted chosen log-ratios above sorted rejected ones",
        coupled=True,
        ranked=True,
    ),
    Loss(
        "discopop",
        margin.discopop,
        "Lu et al., Discovering Preference Optimization Algorithms, arXiv 2406.08414",
        "blend of logistic and exponential, found by a language model",
    ),
    Loss(
        "sft",
        reference_free.sft,
        "Ouyang et al., Training Language Models to Follow Instructions, arXiv 2203.02155",
        "negative log-likelihood per chosen token",
        needs_ref=False,
        sparse=True,
    ),
    Loss(
        "apa_pairs",
        token_level.apa_pairs,
        _APA,
        "squared per-token error to the advantage-tilted reference",
        level="token",
    ),
    Loss(
        "awr_pairs",
        token_level.awr_pairs,
        "Peng et al., Advantage-Weighted Regression, arXiv 1910.00177",
        "likelihood weighted by exponentiated advantages",
        level="token",
        needs_ref=False,
    ),
)


class _Losses(dict[str, Loss]):
    """A dictionary whose ``KeyError`` names the nearest loss."""

    def __missing__(self, name: str) -> Loss:
        if name in ALIASES:
            raise KeyError(
                f"{name!r} is an alias: get_loss({name!r}), or LOSSES[{ALIASES[name][0]!r}]"
            )
        raise KeyError(f"{name!r} is no loss{_near(name)}")


LOSSES: dict[str, Loss] = _Losses({loss.name: loss for loss in _TABLE})

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {}),
    "cdpo": ("dpo", {"label_smoothing": 0.1}),
    "rdpo": ("dpo", {"length_alpha": 0.01}),
    "sigmoid_norm": ("dpo", {"length_norm": True}),
    "dpo_norm": ("dpo", {"length_norm": True}),
    "ipo_norm": ("ipo", {"length_norm": True}),
    "hinge": ("slic", {}),
    "rso": ("slic", {}),
    "kto_pair": ("kto", {}),
    "exo": ("exo_pair", {}),
    "nca": ("nca_pair", {}),
    "bco": ("bco_pair", {}),
    "sppo": ("sppo_hard", {}),
    "aot_pair": ("aot_unpaired", {}),
    "apa": ("apa_pairs", {}),
    "awr": ("awr_pairs", {}),
}
"""Other names: the loss, and the defaults that the alias changes."""


def get_loss(name: str) -> Loss:
    """The loss of that name or alias.

    An alias that changes defaults returns a ``Loss`` under its own name with those defaults.
    Raises ``ValueError`` with the valid names and the nearest one.
    """
    if name in LOSSES:
        return LOSSES[name]
    if name in ALIASES:
        target, defaults = ALIASES[name]
        loss = LOSSES[target]
        return replace(loss, name=name, fn=partial(loss.fn, **defaults)) if defaults else loss
    raise ValueError(
        f"expected a loss name, got {name!r}{_near(name)}. Losses: {', '.join(LOSSES)}. "
        f"Aliases: {', '.join(ALIASES)}."
    )


def _near(name: object) -> str:
    near = difflib.get_close_matches(str(name), [*LOSSES, *ALIASES], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
