"""Single training steps on demand, for ``--compare``: two versions of fastdaa taking turns."""

from __future__ import annotations

import argparse
import tempfile
import weakref
from typing import Any

from fastdaa.benchmarks.step import cases, contenders
from fastdaa.benchmarks.step.plan import Plan

_BATCHES = 4
_WARMUP = 1


def comparison_jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One job for each contender on each case; fastdaa's contenders unless others are named.

    Raises:
        ValueError: unknown names of cases or contenders.
    """
    from fastdaa.benchmarks.step.command import chosen_cases, named_cases

    jobs = []
    # Sizes on the command line make other cases of those that have a name.
    for base, case in zip(named_cases(options), chosen_cases(options), strict=True):
        names = options.contenders or case.contenders
        for contender in contenders.choose(names):
            if options.contenders or contender.library == "fastdaa":
                jobs.append(
                    {
                        "case": case.id, "base": base.id, "contender": contender.name,
                        "data": options.data,
                        "batch": case.batch, "model": case.model.name, "device": options.device,
                        "threads": options.threads, "seed": options.seed,
                        "loss": (options.losses or ["dpo"])[0], "lr": options.lr,
                    }
                )  # fmt: skip
    return jobs


def open_job(job: dict[str, Any]) -> Job:
    """A trainer in a process of its own, warmed up and past the gate; a call does one step.

    Raises:
        fastdaa.benchmarks.contenders.Absent: the contender's library is not installed.
        fastdaa.benchmarks.step.workers.WorkerFailed: the trainer could not be made.
    """
    from fastdaa.benchmarks.contenders import Absent

    contender = contenders.CONTENDERS[job["contender"]]
    case = _case(job)
    reason = contender.absence(case, job["device"])
    if reason is not None:
        raise Absent(reason)
    return Job(contender, case, job)


def _case(job: dict[str, Any]) -> cases.Case:
    if job["data"] is not None:
        case = cases.from_file(job["data"], job["device"])
    else:
        case = cases.CASES[job["base"]]
    return cases.resized(
        case, batch=job["batch"], steps=_BATCHES, warmup=_WARMUP, model=job["model"]
    )


class Job:
    """The steps of one trainer; every call goes on to the next batch, round and round."""

    def __init__(self, contender: contenders.Contender, case: cases.Case, job: dict[str, Any]):
        from fastdaa.benchmarks.step import gate, oracle
        from fastdaa.benchmarks.step.pairs import prepare
        from fastdaa.benchmarks.step.rows import order_of
        from fastdaa.benchmarks.step.workers import run_oracle, trainer_worker

        self._folder = tempfile.TemporaryDirectory(prefix="fastdaa-step-")
        plan = Plan(
            case, self._folder.name, job["device"], job["threads"], job["seed"], job["loss"],
            job["lr"],
        )  # fmt: skip
        prepare(case, plan.folder, plan.seed)
        order = order_of(contender)
        expected = run_oracle(plan, [order])[order]
        self._worker = trainer_worker(contender, plan)
        self._end = weakref.finalize(self, self._worker.stop)
        self._worker.begin()
        first = [self._worker.step() for _ in range(max(_WARMUP, oracle.STEPS))]
        self._reason, _ = gate.compare(
            [report["loss"] for report in first], [report["grad_norm"] for report in first],
            expected, gate.limits(plan),
        )  # fmt: skip

    def __call__(self) -> dict[str, Any]:
        """Seconds and peak bytes of one more step, and the verdict on the first ones."""
        report = self._worker.step()
        return {
            "seconds": report["seconds"],
            "peak_bytes": report["peak_bytes"],
            "status": "wrong" if self._reason else "ok",
            "reason": self._reason,
        }
