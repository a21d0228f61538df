"""Fused preference training: log-probabilities and losses from hidden states, without logits."""

from fastdaa.divergence import token_divergence, token_kl
from fastdaa.head import LmHead, VocabShard
from fastdaa.logps import sequence_logps, token_logps, token_stats
from fastdaa.losses import LOSSES, Objective, implicit_rewards
from fastdaa.modules import (
    FusedLinearAPALoss,
    FusedLinearDPOLoss,
    FusedLinearIPOLoss,
    FusedLinearPairLoss,
    FusedLinearSLiCLoss,
)
from fastdaa.outputs import BatchTotals, PairLogps, PairLossOutput, TokenSelection, TokenStats
from fastdaa.pair_loss import pair_loss
from fastdaa.planner import HeadPlan, plan_head
from fastdaa.selection import select_pairs, select_tokens

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "BatchTotals",
    "FusedLinearAPALoss",
    "FusedLinearDPOLoss",
    "FusedLinearIPOLoss",
    "FusedLinearPairLoss",
    "FusedLinearSLiCLoss",
    "HeadPlan",
    "LmHead",
    "Objective",
    "PairLogps",
    "PairLossOutput",
    "TokenSelection",
    "TokenStats",
    "VocabShard",
    "__version__",
    "implicit_rewards",
    "pair_loss",
    "plan_head",
    "select_pairs",
    "select_tokens",
    "sequence_logps",
    "token_divergence",
    "token_kl",
    "token_logps",
    "token_stats",
]
