"""A row of a results file as the tables, pictures and pages look at it.

One rule lives here and nowhere else: only a row whose status is ``ok`` has a speed-up, a place in a
ranking or a ratio to the floor. What is ``wrong`` may be as fast as it likes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

KINDS = ("step", "head", "loss", "memory", "accuracy")
# The beginnings of contenders' names and the family that each belongs to.
_FAMILIES = {
    "fastdaa": "fastdaa",
    "trl": "trl",
    "liger": "liger",
    "cce": "cce",
    "cut": "cce",
    "quack": "quack",
    "floor": "floor",
    "gemm": "floor",
    "bare": "floor",
}
_ERRORS = ("logps", "loss", "dh", "dw")
_CHOSEN = (("loss", ""), ("batch", " pairs"))


@dataclass(frozen=True)
class Result:
    """One contender on one case."""

    row: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.row["kind"])

    @cached_property
    def case(self) -> str:
        """The case's id; for a step with what may be chosen beside it: loss, pairs of a batch."""
        if self.kind != "step":
            return str(self.row["case"])
        chosen = [f"{self.params[name]}{unit}" for name, unit in _CHOSEN if self.params.get(name)]
        return "/".join([str(self.row["case"]), *chosen])

    @property
    def contender(self) -> str:
        return str(self.row["contender"])

    @property
    def status(self) -> str:
        return str(self.row["status"])

    @property
    def reason(self) -> str:
        return str(self.row.get("reason") or "")

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def measured(self) -> bool:
        """Ran to its end, be the result right or wrong."""
        return self.status in ("ok", "wrong")

    @cached_property
    def params(self) -> Mapping[str, Any]:
        return self.row.get("case_params") or {}

    @cached_property
    def machine(self) -> Mapping[str, Any]:
        return self.row.get("machine") or {}

    @property
    def device(self) -> str:
        """What it ran on; on a CPU with its threads, which decide as much."""
        name, threads = str(self.machine.get("device", "unknown device")), self.row.get("threads")
        if "CPU" not in name or not threads:
            return name
        return f"{name}, {threads} thread{'s' * (threads > 1)} used"

    @property
    def commit(self) -> str:
        dirty = "+" if self.machine.get("dirty") else ""
        return f"{self.machine.get('commit', 'unknown')}{dirty}"

    @cached_property
    def family(self) -> str:
        """``fastdaa``, ``pytorch``, ``trl``, ``liger``, ``cce``, ``quack`` or ``floor``."""
        if self.row.get("family"):
            return str(self.row["family"])
        name = self.contender.lower()
        return next((f for start, f in _FAMILIES.items() if name.startswith(start)), "pytorch")

    @property
    def ours(self) -> bool:
        return self.family == "fastdaa"

    @property
    def peer(self) -> bool:
        """Somebody else's way to do the same work; the bare GEMM does not do it."""
        return self.family not in ("fastdaa", "floor")

    @cached_property
    def seconds(self) -> Mapping[str, Any]:
        return self.row.get("seconds") or {}

    @property
    def median(self) -> float | None:
        """Seconds."""
        return self.seconds.get("median")

    @property
    def peak(self) -> int | None:
        """Bytes above inputs and returned gradients; for a step above policy and reference."""
        return self.row.get("peak_bytes")

    @property
    def over_floor(self) -> float | None:
        """Time as a multiple of the bare matrix products' time in the same run."""
        floor = self.row.get("floor_seconds")
        return self.median / floor if self.ok and self.median and floor else None

    @property
    def speedup(self) -> float | None:
        """Times as fast as the reference; None unless this row is right."""
        return self.row.get("speedup_over_reference") if self.ok else None

    @cached_property
    def errors(self) -> dict[str, float]:
        """Relative errors against float64 by quantity, those that were measured."""
        found = self.row.get("error") or {}
        names = [*(name for name in _ERRORS if name in found), *found]
        values = {name: _number(found[name]) for name in names if name != "limit"}
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def limits(self) -> dict[str, float]:
        """What the gate allows, by quantity."""
        found = (self.row.get("error") or {}).get("limit")
        given = found if isinstance(found, Mapping) else dict.fromkeys(self.errors, found)
        values = {name: _number(value) for name, value in given.items()}
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def share_of_limit(self) -> float | None:
        """The largest error as a share of what the gate allows: above 1 is wrong."""
        shares = [
            self.errors[name] / limit
            for name, limit in self.limits.items()
            if limit > 0 and name in self.errors
        ]
        # NaN is beyond every limit; max() would depend on its place.
        return float("inf") if any(map(math.isnan, shares)) else max(shares, default=None)

    @property
    def tokens(self) -> int | None:
        """N, the scored tokens of the case."""
        return self.params.get("N")


def latest(rows: Iterable[Mapping[str, Any]]) -> list[Result]:
    """The newest row of each contender on each case and device, comparisons left out.

    Rows are in the order of their files, so the later of two is the newer one. Cases and
    contenders keep the order in which they first came.
    """
    newest: dict[tuple[str, ...], Result] = {}
    for row in rows:
        result = Result(row)
        if result.kind in KINDS:
            newest[result.device, result.kind, result.case, result.contender] = result
    return list(newest.values())


def by_case(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results of one kind and device, case by case, contenders in the order of the file."""
    cases: dict[str, list[Result]] = {}
    for result in results:
        cases.setdefault(result.case, []).append(result)
    return cases


def pace(result: Result) -> float | None:
    """Seconds that stand for the contender's speed in rankings.

    Of a step that is the time a pair takes: contenders fed sorted pairs have batches of other
    sizes, and the median batch says little about them.
    """
    rate = result.row.get("pairs_per_second")
    return 1.0 / rate if rate else result.median


def ranked(results: Iterable[Result]) -> list[Result]:
    """Right ones by speed, memory or error, then wrong ones, then those that did not run.

    The floor comes last: it is no contender.
    """

    def place(result: Result) -> tuple[int, float]:
        order = ("ok", "wrong", "failed", "skipped", "absent")
        known = order.index(result.status) if result.status in order else len(order)
        merit = {"memory": result.peak, "accuracy": result.share_of_limit}
        value = merit.get(result.kind, pace(result))
        return (10 if result.family == "floor" else known, math.inf if value is None else value)

    return sorted(results, key=place)


def best(results: Iterable[Result]) -> Result | None:
    """The fastest of those that are right."""
    timed = [result for result in results if result.ok and pace(result)]
    return min(timed, key=lambda result: pace(result) or math.inf, default=None)


def case_title(result: Result) -> str:
    """The case in a few words: model, size and work or loss; its id if nothing is known."""
    params = result.params
    if result.kind == "step":
        known = [str(params[name]) for name in ("workload", "model") if params.get(name)]
        tuning = {"full": "all weights", "lora": "LoRA"}.get(str(params.get("tuning")))
        loss = [f"{_loss(params['loss'])} loss"] if params.get("loss") else []
        return ", ".join([*known, *([tuning] if tuning else []), *loss]) or result.case
    work = params.get("loss") or params.get("work")
    parts = [str(params["model"])] if params.get("model") else []
    if params.get("N") is not None:
        parts.append(f"{params['N']:,} tokens")
    if work:
        parts.append(_WORK.get(work, f"{_loss(work)} loss"))
    return ", ".join(parts) or result.case


def case_details(result: Result) -> str:
    """What else makes the case: what is trained, the distribution, the precision."""
    params, parts = result.params, []
    if result.kind == "step":
        parts += [f"batches of {params['batch']} pairs"] if params.get("batch") else []
        activations = params.get("activations")
        parts += [f"activations {activations}"] if activations not in (None, "default") else []
    elif params.get("head_grad") is not None and params.get("work") != "score":
        parts.append("head trained" if params["head_grad"] else "head frozen")
    if params.get("reference") == "online":
        parts.append("reference computed, too")
    lengths = params.get("lengths")
    if lengths not in (None, "equal"):
        parts.append("unequal lengths" if lengths == "spread" else str(lengths))
    if params.get("distribution"):
        entropy = _number(params.get("entropy"))
        stated = "" if entropy is None else f" ({entropy:.1f} nats)"
        parts.append(f"{params['distribution']} logits{stated}")
    if params.get("dtype"):
        parts.append(str(params["dtype"]))
    return ", ".join(parts)


_WORK = {
    "logps": "log-probs and gradients",
    "score": "log-probs alone",
    "ce": "cross-entropy and gradients",
}


def _loss(name: Any) -> str:
    """As its paper writes it."""
    return "SLiC" if name == "slic" else str(name).upper()


def _number(value: Any) -> float | None:
    """JSON has no NaN and no infinity: rows spell them out."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
