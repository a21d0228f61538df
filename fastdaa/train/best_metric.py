"""``metric_for_best_model``: whether an evaluation will have it, asked before any training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdaa.train.packed_config import PackedConfig

PAIR_METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "logps/chosen_per_token", "logps/rejected_per_token"),
    *("completions/chosen_length", "completions/rejected_length"),
)
REF_METRICS = ("displacement/chosen", "displacement/fraction", "kl/k1")
KL_METRICS = ("kl/token", "kl/sequence")
TOKEN_METRICS = ("entropy", "mean_token_accuracy")
LOGIT_METRICS = ("logits/chosen", "logits/rejected")
WEIGHT_METRICS = ("weights/mean",)
UNPAIRED_METRICS = (
    *(name for name in PAIR_METRICS if name != "rewards/accuracies"),
    "kl/k1",
)
REWARD_METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    "rewards/center",
)
_SPEED = ("runtime", "samples_per_second", "steps_per_second")
_TRACKED = "track/"


def running_metrics(unit: str) -> tuple[str, ...]:
    """Those of every evaluation, whatever is trained on rows that are called ``unit``."""
    rates = (f"throughput/{unit}_per_second", "throughput/tokens_per_second")
    return ("packing/efficiency", "packing/saved", "memory/peak_gib", *rates, *_SPEED)


def check_best_metric(args: PackedConfig, names: Iterable[str], eval_dataset: Any) -> None:
    """Compare ``metric_for_best_model`` with what evaluations will have.

    Args:
        names: metrics of an evaluation, without ``eval_``.
        eval_dataset: the trainer's; of a dictionary every name has that of its set before it.

    Raises:
        ValueError: it is none of them, or checkpoints depend on an evaluation and there is none.
    """
    evaluates = args.eval_strategy != "no"
    if args.save_strategy == "best" and not evaluates:
        raise ValueError(
            "save_strategy: expected an eval_strategy beside 'best', got none; nothing would ever "
            "be saved"
        )
    wanted = args.metric_for_best_model
    if wanted is None or not evaluates:
        return
    sets = list(eval_dataset) if isinstance(eval_dataset, Mapping) else []
    known = [f"{part}_{name}" for part in sets for name in names] if sets else list(names)
    if wanted.removeprefix("eval_") in known:
        return
    listed = ", ".join(names)
    where = f"one of the sets ({', '.join(sets)}), _ and " if sets else ""
    hint = ""
    if wanted.removeprefix("eval_").startswith(_TRACKED):
        hint = "; what is tracked is no part of an evaluation, and its best step is printed anyway"
    raise ValueError(
        f"metric_for_best_model: expected {where}one of {listed}, with or without 'eval_' before "
        f"it, got {wanted!r}{hint}"
    )
