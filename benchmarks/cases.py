"""Cases as data: which head, how many tokens, which work, in which dtype, on which distribution.

``N`` tokens that reach the head, ``V`` vocabulary, ``D`` hidden size. Sizes of the heads are those
of the published checkpoints; ``small`` and ``tiny`` are scaled down for CPUs and tests.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Head(NamedTuple):
    """An LM head without bias."""

    label: str
    vocab: int
    hidden: int
    softcap: float | None = None


HEADS: dict[str, Head] = {
    "pythia-1b": Head("Pythia 1B", 50304, 2048),
    "pythia-2.8b": Head("Pythia 2.8B", 50304, 2560),
    "pythia-6.9b": Head("Pythia 6.9B", 50432, 4096),
    "llama3-1b": Head("Llama-3 1B", 128256, 2048),
    "llama3-8b": Head("Llama-3 8B", 128256, 4096),
    "qwen3-0.6b": Head("Qwen3 0.6B", 151936, 1024),
    "qwen3-8b": Head("Qwen3 8B", 151936, 4096),
    "gemma2-2b": Head("Gemma-2 2B", 256000, 2304, 30.0),
    "small": Head("small", 32000, 512),
    "small-softcap": Head("small, softcap", 32000, 512, 30.0),
    "tiny": Head("tiny", 1009, 64),
    "tiny-softcap": Head("tiny, softcap", 1009, 64, 30.0),
}

TOKEN_WORKS = ("logps", "ce", "score")
LOSSES = ("dpo", "ipo", "slic", "apa")
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
DTYPES = tuple(_SHORT)


@dataclass(frozen=True)
class Case:
    """One question to all contenders."""

    head: str
    """A key of ``HEADS``."""
    tokens: int
    """``N``."""
    work: str = "logps"
    """``"logps"``: token log-probs, and the gradients for a random cotangent; ``"ce"``: mean
    cross-entropy and its gradients; ``"score"``: log-probs without gradient; or one of ``LOSSES``:
    that preference loss of pairs and its gradients."""
    dtype: str = "float32"
    head_grad: bool = True
    """The weight wants a gradient; the hidden states always do, except for ``"score"``."""
    distribution: str = "peaked"
    """``"flat"``: random logits; ``"peaked"``: like those of a trained model."""
    reference: str = "given"
    """Of losses: log-probs of the reference ``"given"``, or computed ``"online"`` from its hidden
    states and weight, one more forward product for everyone."""
    lengths: str = "equal"
    """Completions of ``"equal"`` length, or ``"spread"`` over a factor of up to 8, where
    contenders that take padded rows pad."""

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "head": tuple(HEADS), "work": TOKEN_WORKS + LOSSES, "dtype": DTYPES,
            "distribution": ("flat", "peaked"), "reference": ("given", "online"),
            "lengths": ("equal", "spread"),
        }  # fmt: skip
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if self.tokens < 4 * 4:
            raise ValueError(f"tokens: expected at least 16, got {self.tokens}")

    @property
    def vocab(self) -> int:
        """``V``."""
        return HEADS[self.head].vocab

    @property
    def hidden(self) -> int:
        """``D``."""
        return HEADS[self.head].hidden

    @property
    def softcap(self) -> float | None:
        """``c`` of ``c tanh(z / c)``, or None."""
        return HEADS[self.head].softcap

    @property
    def is_loss(self) -> bool:
        """Preference loss of pairs, and not token log-probs."""
        return self.work in LOSSES

    @property
    def wants_grad(self) -> bool:
        """Gradients are part of the work."""
        return self.work != "score"

    @property
    def wants_head_grad(self) -> bool:
        """The gradient of the weight is part of the work."""
        return self.wants_grad and self.head_grad

    @property
    def pairs(self) -> int:
        """``B``: completions have 256 tokens on average, fewer where there are few tokens."""
        return max(self.tokens // 512, 2)

    @property
    def unit(self) -> int:
        """``U = 2 N V D`` FLOP, one product of the head."""
        return 2 * self.tokens * self.vocab * self.hidden

    @property
    def id(self) -> str:
        """The case in one word."""
        parts = [self.head, self.work, f"n{self.tokens}", _SHORT[self.dtype], self.distribution]
        if self.wants_grad:
            parts.append("trained" if self.head_grad else "frozen")
        if self.reference != "given":
            parts.append(self.reference)
        if self.lengths != "equal":
            parts.append(self.lengths)
        return "-".join(parts)

    @property
    def params(self) -> dict[str, Any]:
        """For the row."""
        params: dict[str, Any] = {
            "model": HEADS[self.head].label, "N": self.tokens, "V": self.vocab, "D": self.hidden,
            "softcap": self.softcap, "work": self.work, "dtype": self.dtype,
            "head_grad": self.wants_head_grad, "distribution": self.distribution,
        }  # fmt: skip
        if self.is_loss:
            params.update(
                loss=self.work, pairs=self.pairs, reference=self.reference, lengths=self.lengths
            )
        return params


def _head_cases() -> dict[str, list[Case]]:
    h200 = Case("llama3-8b", 8192, dtype="bfloat16")
    wide = [
        replace(h200, head=head, distribution=distribution)
        for head in HEADS
        if head not in ("small", "small-softcap", "tiny", "tiny-softcap")
        for distribution in ("flat", "peaked")
    ]
    scaling = [replace(h200, tokens=n) for n in (512, 2048, 32768, 65536)]
    return {
        "quick": [Case("small", 256), Case("small", 256, "score")],
        "cpu": [
            Case("pythia-1b", 128),
            Case("small", 256, "score"),
            Case("small", 256, "ce"),
            Case("small", 256, dtype="bfloat16"),
            Case("small-softcap", 256, head_grad=False),
        ],
        "gpu": [
            h200,
            replace(h200, head_grad=False),
            replace(h200, work="score"),
            replace(h200, work="ce"),
            replace(h200, work="ce", distribution="flat"),
            Case("pythia-1b", 8192, dtype="bfloat16"),
            Case("gemma2-2b", 8192, dtype="bfloat16"),
            replace(h200, tokens=2048),
        ],
        "full": [
            *(replace(case, work=work) for case in wide for work in TOKEN_WORKS),
            *(replace(case, head_grad=False) for case in wide),
            *(replace(case, head_grad=g) for case in scaling for g in (True, False)),
        ],
    }


def _loss_cases() -> dict[str, list[Case]]:
    h200 = Case("llama3-8b", 8192, "dpo", dtype="bfloat16")
    return {
        "quick": [Case("small", 256, "dpo")],
        "cpu": [
            Case("small", 256, "dpo", reference="online"),
            Case("small", 256, "ipo"),
            Case("small", 256, "slic", head_grad=False, reference="online", lengths="spread"),
            Case("small", 256, "apa"),
        ],
        "gpu": [
            h200,
            replace(h200, reference="online", lengths="spread"),
            replace(h200, work="ipo"),
            replace(h200, work="slic", head_grad=False, reference="online"),
            replace(h200, work="apa"),
        ],
        "full": [
            replace(h200, head=head, work=loss, head_grad=grad, reference=reference)
            for head in ("pythia-1b", "llama3-8b", "qwen3-8b", "gemma2-2b")
            for loss in LOSSES
            for grad in (True, False)
            for reference in ("given", "online")
        ],
    }


def _memory_cases() -> dict[str, list[Case]]:
    h200 = Case("llama3-8b", 8192, "dpo", dtype="bfloat16")
    works = [("logps", True), ("logps", False), ("score", True), ("dpo", True)]
    sizes = (512, 2048, 8192, 32768)
    return {
        "quick": [Case("small", 256, "dpo")],
        "cpu": [Case("small", n, "dpo", reference="online") for n in (128, 256, 512)],
        "gpu": [
            *(replace(h200, work="logps", tokens=n) for n in sizes[1:]),
            *(replace(h200, tokens=n) for n in sizes[1:3]),
            replace(h200, work="logps", head_grad=False),
            replace(h200, work="score"),
        ],
        "full": [replace(h200, work=w, head_grad=g, tokens=n) for w, g in works for n in sizes],
    }


def _accuracy_cases() -> dict[str, list[Case]]:
    def of(head: str, tokens: int, dtypes: tuple[str, ...]) -> list[Case]:
        return [
            Case(head, tokens, "logps", dtype, True, distribution)
            for dtype in dtypes
            for distribution in ("flat", "peaked")
        ]

    return {
        "quick": of("tiny", 1024, ("float32", "bfloat16")),
        "cpu": [Case("small", 512), *of("small", 512, ("bfloat16",))],
        "gpu": [
            *of("llama3-8b", 4096, ("bfloat16",)),
            Case("gemma2-2b", 2048, dtype="bfloat16"),
            Case("pythia-1b", 4096, dtype="float16"),
        ],
        "full": [
            *of("pythia-1b", 8192, DTYPES),
            *of("llama3-8b", 8192, ("bfloat16", "float16")),
            *of("qwen3-8b", 8192, ("bfloat16",)),
            *of("gemma2-2b", 8192, ("bfloat16", "float16")),
        ],
    }


SELECTIONS: dict[str, dict[str, list[Case]]] = {
    "head": _head_cases(),
    "loss": _loss_cases(),
    "memory": _memory_cases(),
    "accuracy": _accuracy_cases(),
}
"""Cases by kind and selection: ``quick`` (seconds), ``cpu``, ``gpu`` (an H200) and ``full``."""


def select_cases(
    kind: str,
    selection: str,
    *,
    names: list[str] | None = None,
    losses: list[str] | None = None,
    dtype: str | None = None,
) -> list[Case]:
    """Cases of a selection; of all selections of that kind, if they are named.

    Args:
        names: ids of the cases to keep, or parts of ids.
        losses: keep cases of these losses (and those of no loss).
        dtype: take this dtype instead of that of each case.

    Raises:
        ValueError: an unknown selection or loss, a loss of no case, or a name that fits no case.
    """
    selections = SELECTIONS[kind]
    if selection not in selections:
        raise ValueError(f"selection: expected one of {', '.join(selections)}, got {selection!r}")
    unknown = [loss for loss in losses or () if loss not in LOSSES]
    if unknown:
        raise ValueError(f"losses: expected some of {', '.join(LOSSES)}, got {unknown[0]!r}")
    cases = selections[selection]
    if names:
        everything = list(dict.fromkeys(case for part in selections.values() for case in part))
        ids = [case.id for case in everything]
        for name in names:
            if not any(name in known for known in ids):
                near = difflib.get_close_matches(name, ids, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"cases: expected (a part of) the id of a case, got {name!r}; {hint}--list "
                    "with --selection shows them"
                )
        # A whole id is that case alone, though it may be the beginning of another one's.
        cases = [
            case for case in everything
            if any(name == case.id or (name not in ids and name in case.id) for name in names)
        ]  # fmt: skip
    if losses:
        there = list(dict.fromkeys(case.work for case in cases if case.is_loss))
        absent = [loss for loss in losses if loss not in there]
        if absent:
            raise ValueError(
                f"losses: expected some of {', '.join(there) or 'none'}, which the chosen cases "
                f"have, got {absent[0]!r}; another --selection, or --cases, has others"
            )
        cases = [case for case in cases if not case.is_loss or case.work in losses]
    if dtype is not None:
        cases = list(dict.fromkeys(replace(case, dtype=dtype) for case in cases))
    return cases
