"""Metrics of training on labelled completions; names and averages are those of TRL's KTOTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdaa.outputs import TokenStats
from fastdaa.train.metrics import Sums

SIDES = ("chosen", "rejected")
"""What desirable and undesirable completions are called, as in TRL."""


def sequence_metrics(
    pack: Mapping[str, Any], logps: Tensor, ref_logps: Tensor, beta: float
) -> list[Sums]:
    """Rewards, log-probs, lengths and log-ratios of the completions of a pack.

    Args:
        pack: see :class:`~fastdaa.data.unpaired_collate.UnpairedCollator`.
        logps, ref_logps: ``[S]`` log-probs of policy and reference.
        beta: scale of the rewards.
    """
    logratios, lengths = logps - ref_logps, pack["lengths"].to(logps.dtype)
    names = ("rewards/{}", "logps/{}", "logps/{}_per_token", "completions/{}_length")
    values = torch.stack([beta * logratios, logps, logps / lengths.clamp(min=1), lengths])
    chosen = sum(pack["desirable"])
    return [
        _by_label(names, values, pack["labels"], (chosen, len(logps) - chosen)),
        Sums(("kl/k1",), logratios.sum().view(1), (float(len(logps)),)),
    ]


def token_metrics(pack: Mapping[str, Any], stats: TokenStats) -> list[Sums]:
    """Entropy, top-1 accuracy and mean logits of the scored tokens of a pack, ``[N]`` each."""
    counts = pack["counts"]
    tokens = sum(counts)
    labels = pack["labels"].repeat_interleave(pack["lengths"], output_size=tokens)
    chosen = sum(n for n, desirable in zip(counts, pack["desirable"], strict=True) if desirable)
    totals = torch.stack([stats.entropy.sum(), torch.where(labels, stats.top1, 0).sum()])
    return [
        Sums(("entropy", "mean_token_accuracy"), totals, (float(tokens), float(chosen))),
        _by_label(("logits/{}",), stats.mean_logit[None], labels, (chosen, tokens - chosen)),
    ]


def batch_metric(name: str, value: Tensor, sequences: int) -> Sums:
    """A scalar of the batch, which counts by the completions of a pack."""
    return Sums((name,), value.view(1) * sequences, (float(sequences),))


def with_margins(values: dict[str, float]) -> dict[str, float]:
    """The same values, and the mean reward of desirable completions less that of the others."""
    chosen, rejected = (values.get(f"rewards/{side}") for side in SIDES)
    if chosen is None or rejected is None:
        return values
    return {**values, "rewards/margins": chosen - rejected}


def _by_label(
    names: tuple[str, ...], values: Tensor, labels: Tensor, counts: tuple[int, int]
) -> Sums:
    """Sums of ``values [names, n]`` over what is desirable, and over what is not."""
    zero = values.new_zeros(())
    totals = [torch.where(side, values, zero).sum(dim=1) for side in (labels, ~labels)]
    return Sums(
        tuple(name.format(side) for side in SIDES for name in names),
        torch.cat(totals),
        tuple(float(count) for count in counts for _ in names),
    )
