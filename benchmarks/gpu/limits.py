"""What is asked of the head beside the targets of its four paths: little memory where little is
asked for, time linear and memory flat in the number of tokens, and accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastdaa.benchmarks import wording
from fastdaa.benchmarks.gpu import questions as asked
from fastdaa.benchmarks.gpu.answers import Answers
from fastdaa.benchmarks.gpu.scaling import Point, fit_line, growth
from fastdaa.benchmarks.gpu.targets import LESS_LIMIT, SUM_LIMIT
from fastdaa.benchmarks.reading import Result

_TOO_FEW = "not enough points"


class Verdict(NamedTuple):
    """One more limit, and whether it is kept."""

    part: str
    """Of the check, whose rows answer it."""
    question: str
    subject: str
    """The path or contender, or the case of an accuracy."""
    found: str
    verdict: str
    """``met``, ``missed`` or ``not measured: ...``."""

    @property
    def met(self) -> bool:
        return self.verdict == "met"


def other_limits(answers: Answers) -> list[Verdict]:
    """Every limit beside the targets, those of the paths first.

    Linearity and memory are those of the contender that its path's target is judged by; less memory
    is asked of all engines, accuracy of all of fastdaa's rows.
    """
    return [
        *(_less_memory(answers, path) for path in asked.PATHS),
        *(verdict for path in asked.PATHS for verdict in _over_tokens(answers, path)),
        *_accuracy(answers),
    ]


def _less_memory(answers: Answers, path: str) -> Verdict:
    found = {name: answers.of(path, name) for name in asked.less(path)}
    question = f"at most {wording.size(LESS_LIMIT)} where little is asked for"
    lost = [name for name, result in found.items() if not (result and result.ok and result.peak)]
    peaks = [result.peak for result in found.values() if result and result.ok and result.peak]
    most = max(peaks, default=None)
    if most is not None and most > LESS_LIMIT:
        verdict = "missed"
    else:
        verdict = f"not measured: {', '.join(lost)}" if lost else "met"
    return Verdict("paths", question, path, wording.size(most), verdict)


def _over_tokens(answers: Answers, path: str) -> Iterator[Verdict]:
    best = next((j.result for j in answers.judged() if j.target.path == path), None)
    name = best.contender if best else path
    points = token_points(answers, path, name) if best else []
    sizes = answers.token_counts()
    lacking = [n for n in sizes if n not in {point.tokens for point in points}]
    questions = (f"time linear from N = {sizes[0]} to {sizes[-1]}", "memory flat beyond "
                 f"N = {answers.size.case.tokens}")  # fmt: skip
    for question, found in zip(questions, shape_of(points, answers), strict=True):
        verdict = "met" if found.startswith(("linear", "flat")) else "missed"
        if lacking:
            verdict = f"not measured: N = {', '.join(map(str, lacking))}"
        elif found == _TOO_FEW:
            verdict = "not measured"
        yield Verdict("scaling", question, name, found, verdict)


def token_points(answers: Answers, path: str, name: str) -> list[Point]:
    """What a contender took for every number of tokens that it was right for."""
    found = ((n, answers.of(path, name, tokens=n)) for n in answers.token_counts())
    return [
        Point(n, result.median, result.peak or 0)
        for n, result in found
        if result is not None and result.ok and result.median
    ]


def shape_of(points: Sequence[Point], answers: Answers) -> tuple[str, str]:
    """Linear or not, flat or not, with the numbers behind it."""
    try:
        line = fit_line(points)
        word = "linear" if line.linear else "NOT linear"
        time = f"{word}: {line.slope * 1e6:.3g} us a token, off by {line.deviation:.0%} at most"
    except ValueError:
        time = _TOO_FEW
    try:
        memory = growth(points, answers.size.case.tokens).words(answers.size.case.hidden)
    except ValueError:
        memory = _TOO_FEW
    return time, memory


class Accuracy(NamedTuple):
    """A contender's errors on a case, beside those of gradients from materialised logits."""

    case: str
    contender: str
    total: float | None
    """Largest of sums of 512 log-probs, in nats."""
    gradients: list[tuple[float | None, float | None]]
    """Of dH and dW: its own, and those of the others."""
    verdict: str


def accuracies(answers: Answers) -> list[Accuracy]:
    """Every row of fastdaa in the part ``accuracy``."""
    found = []
    for (kind, case, name), result in answers.results.items():
        if kind == "accuracy" and result.ours and result.measured:
            plain = answers.results.get((kind, case, "pytorch"))
            found.append(_accuracy_of(result, plain, case, name))
    return found


def _accuracy_of(result: Result, plain: Result | None, case: str, name: str) -> Accuracy:
    pairs = [
        (result.errors.get(what), plain.errors.get(what) if plain else None)
        for what in ("dh", "dw")
    ]
    total = result.errors.get("sequence_max")
    missed = ["sum"] * (total is not None and not total <= SUM_LIMIT)
    missed += [w for w, (e, least) in zip(("dH", "dW"), pairs, strict=True) if _above(e, least)]
    verdict = f"missed: {', '.join(missed)}" if missed else "met"
    return Accuracy(case, name, total, pairs, verdict)


def _above(error: float | None, other: float | None) -> bool:
    """In the two digits that are shown; the rest is chance."""
    if error is None or other is None:
        return False
    return not float(f"{error:.1e}") <= float(f"{other:.1e}")


def _accuracy(answers: Answers) -> Iterator[Verdict]:
    question = f"sums of 512 within {SUM_LIMIT:g} nat, gradients as with logits"
    found = accuracies(answers)
    for case, contender, total, _, verdict in found:
        name = f"{contender.removeprefix('fastdaa-')}, {case}"
        yield Verdict("accuracy", question, name, f"{wording.error(total)} nat", verdict)
    if not found:
        yield Verdict("accuracy", question, "recompute", "-", "not measured: no row")
