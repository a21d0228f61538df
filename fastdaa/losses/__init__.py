"""The objectives: plain functions of log-probabilities, a table of them, and weighted mixtures.

A pair loss maps the log-probabilities of both completions under the policy and the reference
(``PairLogps``, sums over tokens, in nats) to one loss a pair, unreduced. ``docs/objectives.md``
lists formulas and papers.
"""

from fastdaa.losses.completion import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from fastdaa.losses.coupled import aot, aot_unpaired, kto
from fastdaa.losses.custom import custom_loss
from fastdaa.losses.margin import (
    MARGIN_FUNCTIONS,
    MarginFunction,
    daa,
    discopop,
    dpo,
    exo_pair,
    exponential,
    f_dpo,
    ipo,
    robust,
    savage,
    slic,
    truncated_quadratic,
)
from fastdaa.losses.objective import Objective, Term, implicit_rewards, token_means
from fastdaa.losses.reference_free import cpo, orpo, sft, simpo, slic_hf
from fastdaa.losses.registry import ALIASES, LOSSES, Loss, get_loss
from fastdaa.losses.token_level import apa, apa_pairs, awr, awr_pairs

__all__ = [
    "ALIASES",
    "LOSSES",
    "MARGIN_FUNCTIONS",
    "Loss",
    "MarginFunction",
    "Objective",
    "Term",
    "aot",
    "aot_unpaired",
    "apa",
    "apa_pairs",
    "apo_down",
    "apo_zero",
    "awr",
    "awr_pairs",
    "bco_pair",
    "cpo",
    "custom_loss",
    "daa",
    "discopop",
    "dpo",
    "exo_pair",
    "exponential",
    "f_dpo",
    "get_loss",
    "implicit_rewards",
    "ipo",
    "kto",
    "nca_pair",
    "orpo",
    "robust",
    "savage",
    "sft",
    "simpo",
    "slic",
    "slic_hf",
    "sppo_hard",
    "token_means",
    "truncated_quadratic",
]
