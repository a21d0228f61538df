"""From what a contender did to a row of results."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastdaa.benchmarks.rows import Row, make_row
from fastdaa.benchmarks.step import accounting, gate
from fastdaa.benchmarks.step.contenders import REFERENCE, Contender
from fastdaa.benchmarks.step.measuring import Measured
from fastdaa.benchmarks.step.model import parameters
from fastdaa.benchmarks.step.oracle import Expected
from fastdaa.benchmarks.step.pairs import PairLengths, describe, in_words
from fastdaa.benchmarks.step.plan import Plan
from fastdaa.benchmarks.step.training import recomputes


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rows of a case have in common."""

    plan: Plan
    lengths: Mapping[str, Sequence[PairLengths]]
    machine: Mapping[str, Any]
    command: str
    rate: float
    """Measured floating-point operations a second of a matrix product."""


def case_params(plan: Plan, given: Sequence[PairLengths]) -> dict[str, Any]:
    """Everything that a reader needs to know about the case, and that makes rows comparable."""
    case = plan.case
    weights, stats = parameters(case.model), describe(given, case.batch)
    return {
        "model": case.model.name, "workload": case.workload.name, "tuning": case.tuning,
        "activations": case.activations, "loss": plan.loss, "batch": case.batch, "lr": plan.lr,
        "warmup_steps": case.warmup, "max_length": case.workload.max_length,
        "dtype": "bf16 autocast, fp32 weights" if plan.mixed else "fp32",
        "V": case.model.vocab, "D": case.model.hidden, "layers": case.model.layers,
        "body_parameters": weights.body, "head_parameters": weights.head,
        "distribution_of_lengths": case.workload.distribution,
        "length_statistics": stats, "lengths": in_words(stats),
    }  # fmt: skip


def order_of(contender: Contender) -> str:
    """Which of the two orders of pairs it is fed."""
    return "sorted" if contender.sorted else "given"


def settings(plan: Plan) -> dict[str, Any]:
    """What else was asked for."""
    return {"steps": plan.case.steps}


def bare_row(setting: Setting, contender: Contender, status: str, reason: str | None) -> Row:
    """A row of a contender that measured nothing, and the identity of one that did."""
    plan = setting.plan
    return make_row(
        "step", plan.case.id, contender.name, status,
        case_params=case_params(plan, setting.lengths["given"]),
        version="" if status == "absent" else contender.version(),
        machine=dict(setting.machine), seed=plan.seed, threads=plan.threads,
        command=setting.command, settings=settings(plan), reason=reason,
        family=contender.library, reference=REFERENCE,
    )  # fmt: skip


def skipped_row(setting: Setting, contender: Contender) -> Row:
    """A row of a contender that there was no time for."""
    return bare_row(setting, contender, "skipped", "the budget was used up")


def measured_row(
    setting: Setting, result: Measured, expected: Mapping[str, Expected], reference: Row | None
) -> Row:
    """The row of a contender: its times, tokens, utilisation and verdict.

    Args:
        expected: of the oracle, by order of pairs.
        reference: row of the contender that speed-ups are against, if there is one.
    """
    plan, contender = setting.plan, result.contender
    timed = result.reports[plan.case.warmup :]
    if result.skipped:
        return skipped_row(setting, contender)
    if result.failure is not None or not timed:
        failure = result.failure or "stopped before its first timed step"
        return bare_row(setting, contender, "failed", failure)
    order = order_of(contender)
    losses = [report["loss"] for report in result.reports]
    norms = [report["grad_norm"] for report in result.reports]
    reason, error = gate.compare(losses, norms, expected[order], gate.limits(plan))
    row = bare_row(setting, contender, "wrong" if reason else "ok", reason)
    row.update(
        error=error,
        seconds=_percentiles([report["seconds"] for report in timed]),
        peak_bytes=timed[-1]["peak_bytes"],
        losses=losses,
        grad_norms=norms,
        expected_losses=list(expected[order].losses),
        expected_grad_norms=list(expected[order].grad_norms),
        step_seconds=[report["seconds"] for report in timed],
        cpu_seconds=[report["cpu_seconds"] for report in timed],
        setup_seconds=result.setup.get("setup_seconds"),
        bytes_before=result.setup.get("bytes_before"),
        turns="one after another" if plan.device == "cuda" else "step by step",
    )
    row.update(_rates(setting, contender, order, len(timed)))
    total = sum(report["seconds"] for report in timed)
    row["mean_seconds"] = total / len(timed)
    for name in ("pairs", "scored_tokens", "useful_tokens", "tokens"):
        row[f"{name}_per_second"] = row[f"timed_{name}"] / total
    # Both are sums over the timed steps until here.
    row["mfu"] = row["floor_seconds"] / total
    row["hfu"] = row["expected_seconds"] / total
    row["floor_seconds"] /= len(timed)
    row["expected_seconds"] /= len(timed)
    row["speedup_over_reference"] = _speedup(row, reference)
    return row


def _rates(setting: Setting, contender: Contender, order: str, steps: int) -> dict[str, Any]:
    """Tokens of the timed steps, and seconds that their work takes at the measured GEMM rate."""
    plan = setting.plan
    batch, first = plan.case.batch, plan.case.batch * plan.case.warmup
    pairs = setting.lengths[order][first : first + batch * steps]
    tokens = accounting.count(contender, pairs, batch, plan.device)
    work = accounting.work(
        tokens, parameters(plan.case.model), lora=plan.case.tuning == "lora",
        online_reference=not contender.cached, recomputed=recomputes(contender, plan),
    )  # fmt: skip
    return {
        "timed_pairs": len(pairs), "timed_scored_tokens": tokens.scored,
        "timed_useful_tokens": tokens.useful, "timed_tokens": tokens.backbone,
        "recomputed": recomputes(contender, plan), "roof_flops": setting.rate,
        "floor": "useful FLOP", "floor_seconds": work.useful / setting.rate,
        "expected_seconds": work.hardware / setting.rate,
    }  # fmt: skip


def _speedup(row: Row, reference: Row | None) -> float | None:
    """Ratio of pairs a second: sorted and unsorted batches differ in size, their sum does not."""
    if row["contender"] == REFERENCE:
        return 1.0 if row["status"] == "ok" else None
    if row["status"] != "ok" or reference is None or reference["status"] != "ok":
        return None
    return float(row["pairs_per_second"] / reference["pairs_per_second"])


def _percentiles(values: list[float]) -> dict[str, float]:
    """Of the timed steps; batches differ in size, so the spread is not noise alone."""
    if len(values) == 1:
        tenths = [values[0]] * 9
    else:
        tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {
        "median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1],
        "min": min(values), "n": len(values),
    }  # fmt: skip
