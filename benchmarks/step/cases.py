"""The cases of the step benchmark as data: workloads, models, settings and selections."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens, ``exp(N(log median, sigma^2))``, cut to ``[low, high]``."""

    median: float
    sigma: float
    low: int
    high: int

    def __str__(self) -> str:
        return f"log-normal, median {self.median:g}, sigma {self.sigma:g}, {self.low}..{self.high}"


@dataclass(frozen=True)
class Workload:
    """Where pairs come from: two length distributions, or a file (``data``).

    Chosen and rejected completions are drawn independently from ``completion``. ``chat-1k`` is
    like the real chats that the benchmark began with (16k BPE, sequences cut to 1024 tokens):
    median prompt 148 tokens, median completion 212, half of a padded batch of 8 is padding.
    """

    name: str
    prompt: Lengths | None = None
    completion: Lengths | None = None
    max_length: int = 1024
    data: str | None = None

    @property
    def distribution(self) -> str:
        """One line for rows and tables."""
        if self.data is not None:
            return f"text from {self.data.rsplit('/', 1)[-1]}, sequences up to {self.max_length}"
        return f"prompt: {self.prompt}; completion: {self.completion}"


@dataclass(frozen=True)
class ModelShape:
    """A randomly initialised Llama: sizes only, nothing is downloaded."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = False


@dataclass(frozen=True)
class Case:
    """One workload on one model in one setting.

    ``tuning`` is ``full`` or ``lora``. ``activations`` is ``default`` (what each library does
    unless told otherwise: TRL recomputes them, fastdaa keeps them), ``kept`` or ``recomputed``,
    which both sides are told.
    """

    workload: Workload
    model: ModelShape
    tuning: str = "full"
    activations: str = "default"
    batch: int = 8
    steps: int = 8
    warmup: int = 1
    contenders: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """``workload/model/tuning``, and ``/activations`` unless each library decides."""
        parts = [self.workload.name, self.model.name, self.tuning]
        return "/".join(parts if self.activations == "default" else [*parts, self.activations])


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("smoke", Lengths(6, 0.5, 2, 12), Lengths(8, 0.5, 3, 16), 32),
        # A third of the real chats' lengths: the quick selection has minutes, not an hour.
        Workload("short-chat", Lengths(60, 0.7, 8, 256), Lengths(110, 0.7, 8, 384), 640),
        Workload("long-completions", Lengths(60, 0.5, 8, 256), Lengths(300, 0.5, 32, 768), 1024),
        Workload("long-prompts", Lengths(400, 0.4, 64, 896), Lengths(50, 0.7, 8, 128), 1024),
        Workload("chat-1k", Lengths(150, 1.0, 4, 900), Lengths(215, 0.9, 4, 900), 1024),
        Workload("completions-4k", Lengths(200, 0.7, 16, 1024), Lengths(1200, 0.6, 64, 3000), 4096),
        Workload("prompts-4k", Lengths(2000, 0.5, 256, 3500), Lengths(150, 0.7, 16, 500), 4096),
    )
}

MODELS = {
    model.name: model
    for model in (
        ModelShape("llama-smoke", 32, 2, 2, 1, 64, 199),
        ModelShape("llama-13m", 256, 6, 8, 8, 682, 16000),
        ModelShape("llama-0.5b", 1280, 16, 20, 5, 5120, 128256, tied=True),
        ModelShape("llama-1.2b", 2048, 16, 32, 8, 8192, 128256, tied=True),
    )
}

# The most telling first: on CUDA a budget cuts the last ones.
EVERYTHING = (
    "trl", "fastdaa-prefix_shared", "trl-sorted", "fastdaa-prefix_shared-sorted", "trl-liger",
    "trl-precomputed", "fastdaa-prefix_shared-cached", "fastdaa-packed", "fastdaa-padded",
)  # fmt: skip
PAIR = ("trl", "fastdaa-prefix_shared")
HEADLINE = ("trl", "trl-sorted", "fastdaa-prefix_shared", "fastdaa-prefix_shared-sorted")


def _cases(model: str, batch: int, warmup: int, workloads: tuple[str, str, str]) -> list[Case]:
    """The most telling cases first: a budget cuts the last ones."""
    chat, completions, prompts = (WORKLOADS[name] for name in workloads)

    def case(
        workload: Workload, contenders: tuple[str, ...], tuning: str = "full", acts: str = "default"
    ) -> Case:
        steps = 3 if model == "llama-13m" else 6
        return Case(workload, MODELS[model], tuning, acts, batch, steps, warmup, contenders)

    return [
        case(chat, EVERYTHING),
        case(prompts, PAIR, "lora"),
        case(completions, PAIR, "full", "recomputed"),
        case(completions, (*PAIR, "trl-sorted", "fastdaa-padded")),
        case(prompts, (*PAIR, "trl-sorted", "fastdaa-packed")),
        case(chat, PAIR, "full", "kept"),
        case(chat, (*PAIR, "trl-precomputed", "fastdaa-prefix_shared-cached"), "lora", "kept"),
        case(chat, PAIR, "lora", "recomputed"),
    ]


_CPU = _cases("llama-13m", 4, 1, ("short-chat", "long-completions", "long-prompts"))
_GPU = _cases("llama-0.5b", 8, 2, ("chat-1k", "completions-4k", "prompts-4k"))
_SMOKE = Case(
    WORKLOADS["smoke"], MODELS["llama-smoke"], batch=2, steps=3,
    contenders=("trl", "fastdaa-padded", "fastdaa-prefix_shared", "fastdaa-prefix_shared-cached"),
)  # fmt: skip
_FULL = {
    "cpu": [*_CPU, Case(WORKLOADS["chat-1k"], MODELS["llama-13m"], contenders=EVERYTHING)],
    "cuda": [*_GPU, *(dataclasses.replace(case, model=MODELS["llama-1.2b"]) for case in _GPU)],
}
SELECTIONS: dict[str, list[Case]] = {
    "tiny": [_SMOKE],
    "quick": _CPU[:3],
    "cpu": _CPU,
    "gpu": _GPU[:3],
    "full": [],
}
"""``full`` depends on the device: a CPU does not train half a billion weights for a table."""
CASES = {case.id: case for case in (_SMOKE, *_FULL["cpu"], *_FULL["cuda"])}


def choose(names: list[str] | None, selection: str | None, device: str) -> list[Case]:
    """The cases that ``--cases`` names, or else those of ``--selection``.

    A name is an id, or a part of ids of the device's cases: a CPU is not given a GPU's unasked.

    Raises:
        ValueError: an unknown name.
    """
    if names is None:
        name = selection or ("gpu" if device == "cuda" else "quick")
        return list(_FULL[device] if name == "full" else SELECTIONS[name])
    known = [case.id for case in (_SMOKE, *_FULL[device])]
    found: list[str] = []
    for name in names:
        ids = [name] if name in CASES else [one for one in known if name in one]
        if not ids:
            near = difflib.get_close_matches(name, CASES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"cases: {', '.join(CASES)}"
            raise ValueError(
                f"--cases: expected (a part of) the id of a case, got {name!r}; {hint}"
            )
        found += ids
    return [CASES[name] for name in dict.fromkeys(found)]


def from_file(data: str, device: str) -> Case:
    """Real pairs from a JSON lines file: what the README's table is made of."""
    model = MODELS["llama-0.5b" if device == "cuda" else "llama-13m"]
    return Case(Workload("data", max_length=1024, data=data), model, contenders=HEADLINE)


def resized(
    case: Case, *, batch: int | None, steps: int | None, warmup: int | None, model: str | None
) -> Case:
    """The case with other sizes, where given.

    Raises:
        ValueError: an unknown model.
    """
    given = {"batch": batch, "steps": steps, "warmup": warmup}
    changes: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    if model is not None:
        if model not in MODELS:
            raise ValueError(f"--model: expected one of {', '.join(MODELS)}, got {model!r}")
        changes["model"] = MODELS[model]
    return dataclasses.replace(case, **changes)  # type: ignore[arg-type]


def log_normal(lengths: Lengths, normal: float) -> int:
    """A length from a standard normal number."""
    size = round(math.exp(math.log(lengths.median) + lengths.sigma * normal))
    return min(max(size, lengths.low), lengths.high)
