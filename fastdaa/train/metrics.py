"""Metrics of preference training, gathered on the device and read out when a row is logged.

Names and averages are TRL's where TRL has them: a mean over the pairs or tokens of all ranks for
every micro-batch, then a plain mean over the micro-batches of a logging interval. Nothing waits for
the device before the row is written.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.logps import pair_logps, sequence_logps
from fastdaa.losses import Objective, implicit_rewards, token_means
from fastdaa.losses.weights import desensitized, tail_tokens
from fastdaa.outputs import PairLogps, PairLossOutput, TokenStats

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastdaa.train.policy import PackResult
    from fastdaa.train.references import ReferenceScores


class Sums(NamedTuple):
    """Several metrics of a pack: what to divide by what."""

    names: tuple[str, ...]
    totals: Tensor
    """``[names]`` on the device."""
    counts: tuple[float, ...]
    """The divisors, known on the host."""


def pair_metrics(
    output: PairLossOutput,
    ref: PairLogps | None,
    objective: Objective,
    compared: tuple[PairLogps, PairLogps | None] | None = None,
) -> Sums:
    """Rewards, log-probs, lengths, log-ratios, displacement and weights of the pairs of a pack.

    Args:
        compared: what the loss has compared of policy and reference, if not ``output.policy`` and
            ``ref``; rewards and log-probs are those, as TRL logs them.
    """
    policy = output.policy
    summed, summed_ref = (policy, ref) if compared is None else compared
    chosen_rewards, rejected_rewards = implicit_rewards(summed, summed_ref, objective.beta)
    values = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": chosen_rewards > rejected_rewards,
        "logps/chosen": summed.chosen,
        "logps/rejected": summed.rejected,
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
    if output.pair_weights is not None:
        values["weights/mean"] = output.pair_weights
    dtype = policy.chosen.dtype
    totals = torch.stack([value.to(dtype) for value in values.values()]).sum(dim=1)
    return Sums(tuple(values), totals, (float(policy.chosen.numel()),) * len(values))


def token_metrics(stats: TokenStats, lengths: Tensor, counts: Sequence[int]) -> Sums:
    """Entropy, mean logits and top-1 accuracy of the scored tokens of a pack.

    Args:
        stats: ``[N]`` each.
        lengths: ``[S]`` scored tokens, pair-major.
        counts: the same on the host.
    """
    chosen, rejected = float(sum(counts[::2])), float(sum(counts[1::2]))
    # unsafe skips a check of the lengths that would wait for the device.
    columns = torch.stack([stats.entropy, stats.top1, stats.mean_logit], dim=1)
    sequences = torch.segment_reduce(columns, "sum", lengths=lengths, unsafe=True)
    (entropy, top1, logit), (rejected_entropy, _, rejected_logit) = sequences.view(-1, 2, 3).sum(0)
    return Sums(
        ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"),
        torch.stack([entropy + rejected_entropy, top1, logit, rejected_logit]),
        (chosen + rejected, chosen, chosen, rejected),
    )


def kl_metrics(token_kl: Tensor, sequences: int) -> Sums:
    """Exact KL to the reference of a pack, per token and per completion; ``token_kl [N]``."""
    counts = (float(token_kl.numel()), float(sequences))
    return Sums(("kl/token", "kl/sequence"), token_kl.sum().expand(2), counts)


def aux_metrics(aux_loss: Tensor, pairs: int) -> Sums:
    """Load-balancing loss of a pack, which counts by its pairs where a batch has several."""
    return Sums(("aux_loss",), (aux_loss * pairs).view(1), (float(pairs),))


@torch.no_grad()
def pack_metrics(
    pack: Mapping[str, Any], result: PackResult, ref: ReferenceScores | None, objective: Objective
) -> list[Sums]:
    """Everything that is known of a pack."""
    output, pairs = result.output, len(pack["counts"]) // 2
    logps = None if ref is None else pair_logps(ref.sequence_logps, pack["completion_lengths"])
    sums = [pair_metrics(output, logps, objective, _compared(pack, output, ref, objective))]
    if output.stats is not None:
        sums.append(token_metrics(output.stats, pack["lengths"], pack["counts"]))
    if result.kl is not None:
        sums.append(kl_metrics(result.kl, 2 * pairs))
    if result.aux_loss is not None:
        sums.append(aux_metrics(result.aux_loss, pairs))
    return sums


def _compared(
    pack: Mapping[str, Any],
    output: PairLossOutput,
    ref: ReferenceScores | None,
    objective: Objective,
) -> tuple[PairLogps, PairLogps | None] | None:
    """Means per token where the loss compares those; the sums of LD-DPO under policy and reference;
    None where it compares the sums of all tokens."""
    if objective.compares_means:
        return token_means(output.policy), None
    alpha, lengths = objective.ld_alpha, pack["lengths"]
    if alpha is None or ref is None or ref.token_logps is None:
        return None
    tail = tail_tokens(lengths, sum(pack["counts"]))
    policy, reference = (
        pair_logps(
            sequence_logps(desensitized(logps, tail, alpha), lengths), pack["completion_lengths"]
        )
        for logps in (output.token_logps, ref.token_logps)
    )
    return policy, reference


class MetricStore:
    """Sums of one phase (training or one evaluation), micro-batch by micro-batch."""

    def __init__(self) -> None:
        self.rows: list[Sums] = []
        self.batch: dict[tuple[str, ...], Sums] = {}
        self.throughput = Throughput()

    def begin_batch(self) -> None:
        """Start a micro-batch; what a batch that failed has left is forgotten."""
        self.batch = {}
        self.throughput.begin()

    def add(self, sums: Sums) -> None:
        """Add the metrics of a pack to the current micro-batch."""
        old = self.batch.get(sums.names)
        if old is not None:
            counts = tuple(a + b for a, b in zip(old.counts, sums.counts, strict=True))
            sums = Sums(sums.names, old.totals + sums.totals, counts)
        self.batch[sums.names] = sums

    def end_batch(self, batch: Mapping[str, Any]) -> None:
        """Close the micro-batch."""
        self.rows += self.batch.values()
        self.batch = {}
        self.throughput.add(batch)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The averages of the interval over all ranks; starts a new interval.

        Every rank has to call it. Costs one reduction over the ranks and one device read. A
        micro-batch that has nothing of a kind, such as no scored token, does not count; a value
        that is not a number does, and shows.
        """
        if not self.rows:
            return {}
        device = accelerator.device
        # One after the other, all metrics of all micro-batches, and the numbers of the throughput.
        counts = [count for row in self.rows for count in row.counts]
        host = torch.tensor([*counts, *self.throughput.counts()], dtype=torch.float64)
        totals = torch.cat([row.totals for row in self.rows]).double()
        sums = accelerator.reduce(torch.cat([totals, host.to(device)]), reduction="sum").tolist()
        names = [name for row in self.rows for name in row.names]
        means: dict[str, list[float]] = {}
        for name, total, count in zip(names, sums, sums[len(names) :], strict=False):
            values = means.setdefault(name, [])
            if count > 0:
                values.append(total / count)
        self.rows = []
        result = {name: sum(v) / len(v) if v else float("nan") for name, v in means.items()}
        return result | self.throughput.read(*sums[2 * len(names) :])


class Throughput:
    """Pairs, tokens and time of an interval; all numbers are known on the host."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin an interval with the next batch."""
        self.pairs = self.tokens = self.positions = self.padded_tokens = 0
        self.since: float | None = None

    def begin(self) -> None:
        """Start the clock with the first batch of an interval."""
        if self.since is None:
            self.since = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Something else took so long, such as an evaluation in the middle of the interval."""
        if self.since is not None:
            self.since += seconds

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count a batch."""
        self.pairs += len(batch["row_ids"])
        self.tokens += sum(pack["tokens"] for pack in batch["packs"])
        self.positions += sum(pack["input_ids"].numel() for pack in batch["packs"])
        self.padded_tokens += sum(pack["padded_tokens"] for pack in batch["packs"])

    def counts(self) -> tuple[float, ...]:
        """The numbers of this rank that :meth:`read` wants summed over all of them."""
        return float(self.pairs), float(self.tokens), float(self.positions), self.padded_tokens

    def read(
        self, pairs: float, tokens: float, positions: float, padded: float
    ) -> dict[str, float]:
        """Rates of the interval, from the counts of all ranks; starts a new interval."""
        seconds = time.perf_counter() - (self.since or time.perf_counter())
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
