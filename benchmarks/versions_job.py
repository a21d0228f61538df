"""Jobs of ``--compare`` for head and loss: one contender on one case, measured call by call."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastdaa.benchmarks import contenders as field
from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.gate import Gate
from fastdaa.benchmarks.inputs import make_inputs
from fastdaa.benchmarks.measure import measure_peak, time_once
from fastdaa.benchmarks.sweep import chosen_cases, select_contenders


def comparison_jobs(kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case with every contender that can do it: those of fastdaa, if none are named."""
    jobs = []
    for case in chosen_cases(kind, options):
        for contender in select_contenders(options.contenders or ["fastdaa"], kind):
            if contender.applies(case) and contender.supports(case) is None:
                jobs.append(
                    {"case": case.id, "contender": contender.name, "device": options.device,
                     "seed": options.seed, "threads": options.threads,
                     "settings": dataclasses.asdict(case)}
                )  # fmt: skip
    return jobs


def open_job(job: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Inputs, gate and two runs; then a callable that times one run.

    Raises:
        Absent: a contender that is not here.
    """
    torch.set_num_threads(job["threads"])
    case, device = Case(**job["settings"]), job["device"]
    contender = next((c for c in field.ALL if c.name == job["contender"]), None)
    if contender is None:
        raise field.Absent(f"no contender {job['contender']!r} in this version")
    contender.version()
    contender.check_device(device)
    inputs = make_inputs(case, job["seed"], device)
    run = contender.prepare(inputs)
    verdict = Gate(inputs).check(run())
    outputs, peak = measure_peak(run, device)
    memory = peak - outputs.gradient_bytes
    del outputs

    def measure() -> dict[str, Any]:
        return {
            "seconds": time_once(run, device), "peak_bytes": memory, "status": verdict.status,
            "reason": verdict.reason,
        }  # fmt: skip

    return measure
