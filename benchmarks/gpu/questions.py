"""What a GPU is asked about the head: cases and contenders of each part, as data.

The four paths of the head on one case (``paths``), the same from few tokens to many (``scaling``)
and with other vocabularies (``vocabularies``). ``tiny`` asks the same of a CPU within seconds,
where Triton's kernels run in its interpreter; it is a rehearsal of the processes and tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fastdaa.benchmarks import contenders as field
from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.contenders import Contender
from fastdaa.benchmarks.contenders.fastdaa import ENGINES_OF, LESS_BYTES, Fastdaa, name_of

PATHS = ("single_pass", "recompute", "frozen", "score")
"""The most work first: what runs out of time has the best-known path last."""
PARTS = ("paths", "scaling", "vocabularies")
PEERS = ("pytorch", "trl")
_WORK: dict[str, dict[str, object]] = {
    "score": {"work": "score"},
    "frozen": {"head_grad": False},
    "single_pass": {"work": "dpo"},
    "recompute": {},
}


class Size(NamedTuple):
    """What the parts measure on a kind of machine."""

    case: Case
    tokens: tuple[int, ...]
    """Of ``scaling``, beside those of ``case``."""
    heads: tuple[str, ...]
    """Of ``vocabularies``, beside that of ``case``."""
    repeats: int


SIZES = {
    "gpu": Size(
        Case("llama3-8b", 8192, dtype="bfloat16"),
        (512, 2048, 32768, 65536),
        ("pythia-1b", "qwen3-8b", "gemma2-2b"),
        repeats=20,
    ),
    "tiny": Size(Case("tiny", 64, dtype="bfloat16"), (16, 32), ("tiny-softcap",), repeats=1),
}


class Question(NamedTuple):
    """A path of the head on a case, and who is asked."""

    path: str
    case: Case
    contenders: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Of its rows."""
        return "loss" if self.case.is_loss else "head"


def case_of(path: str, like: Case) -> Case:
    """The case whose natural path is ``path``, with the sizes of another."""
    return replace(like, **_WORK[path])  # type: ignore[arg-type]


def questions(part: str, size: str) -> list[Question]:
    """The questions of a part, the weightiest first.

    Raises:
        ValueError: an unknown part or size.
    """
    if part not in PARTS or size not in SIZES:
        raise ValueError(
            f"expected a part of {', '.join(PARTS)} and a size of {', '.join(SIZES)}, got "
            f"{part!r} and {size!r}"
        )
    given = SIZES[size]
    if part == "paths":
        return [Question(p, case_of(p, given.case), (*PEERS, *ours(p), *less(p))) for p in PATHS]
    if part == "scaling":
        cases = [replace(given.case, tokens=n) for n in given.tokens]
        return [Question(p, case_of(p, c), ours(p)) for c in cases for p in PATHS]
    cases = [replace(given.case, head=head) for head in given.heads]
    return [Question(p, case_of(p, c), ("trl", *ours(p))) for c in cases for p in PATHS]


def ours(path: str) -> tuple[str, ...]:
    """fastdaa's contenders of a path, one an engine."""
    return tuple(name_of(path, engine) for engine in ENGINES_OF[path])


def less(path: str) -> tuple[str, ...]:
    """fastdaa's contenders of a path when asked for little memory."""
    engines = [engine for engine in ENGINES_OF[path] if engine != "fused"]
    return tuple(name_of(path, engine, LESS_BYTES) for engine in engines)


def everybody() -> tuple[str, ...]:
    """Names of all contenders of all parts."""
    names = [name for path in PATHS for name in (*PEERS, *ours(path), *less(path))]
    return tuple(dict.fromkeys(names))


def contender(name: str, device: str) -> Contender:
    """A contender by name; on a CPU fastdaa's Triton engines run in the interpreter.

    Raises:
        ValueError: an unknown name.
    """
    found = next((c for c in field.ALL if c.name == name), None)
    if found is None:
        raise ValueError(f"expected the name of a contender, got {name!r}")
    if device == "cpu" and isinstance(found, Fastdaa):
        return Fastdaa(found.path, found.engine, found.max_bytes, interpreted=True)
    return found


def invited(question: Question, names: Sequence[str] | None, device: str) -> list[Contender]:
    """The contenders of a question, those in ``names`` only if it is given."""
    chosen = [n for n in question.contenders if names is None or n in names]
    return [contender(name, device) for name in chosen]
