"""Metrics of preference training, gathered on the device and read out when a row is logged.

Names and averages are TRL's where TRL has them: a mean over the pairs or tokens of all ranks for
every micro-batch, then a plain mean over the micro-batches of a logging interval. Nothing waits for
the device before the row is written.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdaa.losses import Objective, implicit_rewards
from fastdaa.outputs import PairLogps, PairLossOutput, TokenStats

if TYPE_CHECKING:
    from accelerate import Accelerator

Fraction = tuple[Tensor, Tensor]
"""A sum and what it has to be divided by, both scalars on the device."""


def pair_metrics(
    output: PairLossOutput, ref: PairLogps | None, objective: Objective
) -> dict[str, Fraction]:
    """Rewards, log-probs, lengths, log-ratios and displacement of the pairs of a pack."""
    policy = output.policy
    chosen_rewards, rejected_rewards = implicit_rewards(policy, ref, objective.beta)
    values = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": chosen_rewards > rejected_rewards,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
        "logps/chosen_per_token": policy.chosen / policy.chosen_lengths.clamp(min=1),
        "logps/rejected_per_token": policy.rejected / policy.rejected_lengths.clamp(min=1),
        "completions/chosen_length": policy.chosen_lengths,
        "completions/rejected_length": policy.rejected_lengths,
    }
    if ref is not None:
        moved = policy.chosen - ref.chosen
        values["displacement/chosen"] = moved
        values["displacement/fraction"] = moved < 0
        values["kl/k1"] = 0.5 * (moved + policy.rejected - ref.rejected)
    count = policy.chosen.new_tensor(policy.chosen.numel())
    return {name: (value.to(count.dtype).sum(), count) for name, value in values.items()}


def token_metrics(stats: TokenStats, lengths: Tensor) -> dict[str, Fraction]:
    """Entropy, mean logits and top-1 accuracy of the scored tokens of a pack.

    Args:
        stats: ``[N]`` each. lengths: ``[S]`` scored tokens, pair-major.
    """
    side = torch.arange(lengths.numel(), device=lengths.device) % 2
    # With output_size the device need not be waited for.
    rejected = side.repeat_interleave(lengths, output_size=stats.entropy.numel())
    rejected = rejected.to(stats.entropy.dtype)
    chosen = 1.0 - rejected
    chosen_tokens, rejected_tokens = chosen.sum(), rejected.sum()
    return {
        "entropy": (stats.entropy.sum(), chosen_tokens + rejected_tokens),
        "mean_token_accuracy": ((stats.top1 * chosen).sum(), chosen_tokens),
        "logits/chosen": ((stats.mean_logit * chosen).sum(), chosen_tokens),
        "logits/rejected": ((stats.mean_logit * rejected).sum(), rejected_tokens),
    }


def kl_metrics(token_kl: Tensor, sequences: int) -> dict[str, Fraction]:
    """Exact KL to the reference of a pack, per token and per completion; ``token_kl [N]``."""
    total = token_kl.sum()
    tokens, count = total.new_tensor(token_kl.numel()), total.new_tensor(sequences)
    return {"kl/token": (total, tokens), "kl/sequence": (total, count)}


class MetricStore:
    """Sums of one phase (training or one evaluation), micro-batch by micro-batch."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Fraction]] = {}
        self.batch: dict[str, Fraction] = {}
        self.throughput = Throughput()

    def add(self, metrics: Mapping[str, Fraction]) -> None:
        """Add the metrics of a pack to the current micro-batch."""
        for name, (total, count) in metrics.items():
            old = self.batch.get(name)
            self.batch[name] = (total, count) if old is None else (old[0] + total, old[1] + count)

    def end_batch(self, batch: Mapping[str, Any]) -> None:
        """Close the micro-batch."""
        for name, fraction in self.batch.items():
            self.rows.setdefault(name, []).append(fraction)
        self.batch = {}
        self.throughput.add(batch)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The averages of the interval over all ranks; starts a new interval.

        Every rank has to call it. Costs one reduction over the ranks and one device read.
        """
        if not self.rows:
            return {}
        names = list(self.rows)
        sizes = [len(self.rows[name]) for name in names]
        flat = [torch.stack(fraction) for name in names for fraction in self.rows[name]]
        sums = accelerator.reduce(torch.stack(flat).double(), reduction="sum")
        means = (sums[:, 0] / sums[:, 1]).split(sizes)
        values = torch.stack([mean.nanmean() for mean in means]).tolist()
        result = dict(zip(names, values, strict=True))
        result.update(self.throughput.read(accelerator))
        self.rows = {}
        return result


class Throughput:
    """Pairs, tokens and time of an interval; all numbers are known on the host."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin an interval now."""
        self.pairs = self.tokens = self.positions = self.padded_tokens = 0
        self.since: float | None = None

    def begin(self) -> None:
        """Start the clock with the first batch of an interval."""
        if self.since is None:
            self.since = time.perf_counter()

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count a batch."""
        self.pairs += len(batch["row_ids"])
        self.tokens += sum(pack["tokens"] for pack in batch["packs"])
        self.positions += sum(pack["input_ids"].numel() for pack in batch["packs"])
        self.padded_tokens += sum(pack["padded_tokens"] for pack in batch["packs"])

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Rates over all ranks; starts a new interval."""
        seconds = time.perf_counter() - (self.since or time.perf_counter())
        counts = [float(n) for n in (self.pairs, self.tokens, self.positions, self.padded_tokens)]
        local = torch.tensor(counts, device=accelerator.device)
        pairs, tokens, positions, padded = accelerator.reduce(local, reduction="sum").tolist()
        self.restart()
        values = {
            "packing/efficiency": tokens / max(positions, 1.0),
            "packing/saved": 1.0 - positions / max(padded, 1.0),
            "memory/peak_gib": peak_gib(),
        }
        if seconds > 0:
            values["throughput/pairs_per_second"] = pairs / seconds
            values["throughput/tokens_per_second"] = tokens / seconds
        return values


def peak_gib() -> float:
    """Peak memory so far: of the CUDA device, or else of this process, in GiB."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
