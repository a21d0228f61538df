"""What the rows say in a few sentences: computed from them, defeats included."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fastdaa.benchmarks.reading import Result, best, by_case, case_details, case_title, pace
from fastdaa.benchmarks.wording import error, join, size, three_digits
from fastdaa.counted import counted

# Differences below this are not worth a sentence: run-to-run noise of a shared machine.
_NOISE = 1.03
_MOST_NAMES = 4
# Contenders that have computed the reference's log-probs beforehand do less work in a step.
_PREPARED = ("cached", "precomputed")


class Headline(NamedTuple):
    """A sentence and its colour: ``good``, ``bad`` or ``plain``."""

    text: str
    tone: str = "plain"


class _Duel(NamedTuple):
    """The fastest right contenders of a case, ours and somebody else's."""

    ours: Result
    theirs: Result
    title: str

    @property
    def gain(self) -> float:
        """How many times as fast ours is: each over the reference of its own run, where both are,
        since the two may be of different runs."""
        if self.ours.speedup and self.theirs.speedup:
            return self.ours.speedup / self.theirs.speedup
        return (pace(self.theirs) or 0.0) / (pace(self.ours) or 1.0)


def headlines(kind: str, results: Iterable[Result]) -> list[Headline]:
    """Sentences on the results of one kind on one device, the most telling first."""
    shown = list(results)
    if kind == "step":
        return _step(shown)
    if kind in ("head", "loss"):
        return _against_peers(shown)
    return _memory(shown) if kind == "memory" else _accuracy(shown)


def verdict(results: Iterable[Result]) -> Headline:
    """How many results the gate has checked, and whose were wrong."""
    checked = [result for result in results if result.measured and result.errors]
    wrong = [result for result in checked if not result.ok]
    if not checked:
        return Headline("No result was checked against 64-bit arithmetic.", "bad")
    count = f"{counted(len(checked), 'result')} checked against 64-bit arithmetic"
    if not wrong:
        return Headline(f"{count}; all are right.", "good")
    names = sorted({result.contender for result in wrong})
    ours = any(result.ours for result in wrong)
    return Headline(
        f"{count}; {len(wrong)} {'is' if len(wrong) == 1 else 'are'} WRONG: {_some(names)}.",
        "bad" if ours else "plain",
    )


def _duels(results: Iterable[Result], peer: Callable[[Result], bool]) -> list[_Duel]:
    found = []
    cases = by_case(results)
    titles = Counter(case_title(members[0]) for members in cases.values())
    for members in cases.values():
        ours = best(result for result in members if result.ours)
        theirs = best(result for result in members if peer(result))
        if ours and theirs:
            title = case_title(ours)
            # Of several cases of one title, a sentence says which.
            title += f", {case_details(ours)}" if titles[title] > 1 else ""
            found.append(_Duel(ours, theirs, title))
    return found


def _step(results: Sequence[Result]) -> list[Headline]:
    """Against TRL as it comes and against TRL's fastest variant, then case by case."""
    fair = [r for r in results if not any(word in r.contender for word in _PREPARED)]
    plain = _duels(fair, lambda result: result.contender == "trl")
    fastest = _duels(fair, lambda result: result.peer)
    lines = []
    if plain:
        span = _span([duel.gain for duel in plain])
        text = f"fastdaa trains {span} times as many pairs a second as TRL's DPOTrainer as it comes"
        text += f" ({_cases(len(plain))}){_at_its_best(fair)}."
        lines.append(Headline(text, _tone(min(duel.gain for duel in fastest))))
    weighed = [duel for duel in plain if duel.ours.peak and duel.theirs.peak]
    if weighed:
        shares = [(duel.ours.peak or 0) / (duel.theirs.peak or 1) for duel in weighed]
        text = (
            f"Its peak memory above both models is {_span(shares)} times that of TRL's DPOTrainer."
        )
        lines.append(Headline(text, _tone(1 / max(shares))))
    for duel in fastest:
        text = f"{duel.title}: {duel.ours.contender} {_pace_words(duel.gain)}"
        lines.append(Headline(f"{text} {duel.theirs.contender}.", _tone(duel.gain)))
    return lines


def _at_its_best(results: Sequence[Result]) -> str:
    """Against TRL's fastest variant, of the cases in which there is more than the plain one."""
    variants = [r for r in results if r.peer and r.ok and r.contender != "trl"]
    cases = {result.case for result in variants}
    duels = _duels([r for r in results if r.case in cases], lambda result: result.peer)
    if not duels:
        return ""
    names = join(sorted({result.contender for result in variants}))
    which = "the case" if len(duels) == 1 else f"the {counted(len(duels), 'case')}"
    return (
        f", and {_span([duel.gain for duel in duels])} times as many as TRL at its best "
        f"({which} in which {names} was run as well)"
    )


def _against_peers(results: Sequence[Result]) -> list[Headline]:
    """All cases: how often ours is the fastest right one, by how much, and where it is not."""
    duels = _duels(results, lambda result: result.peer)
    if not duels:
        return []
    gains = [duel.gain for duel in duels]
    wins = sum(gain > _NOISE for gain in gains)
    ties = sum(1 / _NOISE <= gain <= _NOISE for gain in gains)
    text = f"fastdaa is the fastest right contender in {wins} of {_cases(len(gains))}"
    text += f" and level with the fastest peer in {ties}" if ties else ""
    middle = statistics.median(gains)
    text += f"; in the median it {_pace_words(middle)} the fastest peer of the case."
    lines = [Headline(text, _tone(middle))]
    lost = [
        f"{duel.title} ({duel.theirs.contender} is {three_digits(1 / duel.gain)} times as fast)"
        for duel in duels
        if duel.gain < 1 / _NOISE
    ]
    if lost:
        lines.append(Headline(f"A peer is faster in: {_some(lost)}.", "bad"))
    ahead = [duel.ours.speedup for duel in duels if duel.ours.speedup]
    if ahead:
        text = f"Against plain PyTorch it is {_span(ahead)} times as fast."
        lines.append(Headline(text, _tone(min(ahead))))
    return lines


def _memory(results: Sequence[Result]) -> list[Headline]:
    """The case with most tokens: ours against the reference and the leanest peer."""
    cases = by_case(results).values()
    biggest = max(cases, key=lambda members: members[0].tokens or 0, default=[])
    right = [result for result in biggest if result.ok and result.peak is not None]
    ours = min((r for r in right if r.ours), key=lambda r: r.peak or 0, default=None)
    lean = min((r for r in right if r.peer), key=lambda r: r.peak or 0, default=None)
    plain = next((result for result in right if result.contender == "pytorch"), None)
    if ours is None or lean is None:
        return []
    text = (
        f"{case_title(ours)}: {ours.contender} needs {size(ours.peak)} beside inputs and gradients"
    )
    text += f", plain PyTorch {size(plain.peak)}" if plain is not None else ""
    text += f", the leanest peer ({lean.contender}) {size(lean.peak)}" if lean is not plain else ""
    return [Headline(f"{text}.", "good" if (ours.peak or 0) <= (lean.peak or 0) else "bad")]


def _accuracy(results: Sequence[Result]) -> list[Headline]:
    """The largest errors over all cases, ours and the reference's; repeatability."""
    lines = [
        _worst(results, ("logps",), "Largest error of a log-probability, in nats"),
        _worst(results, ("dh", "dw"), "Largest relative error of a gradient"),
    ]
    shaky = sorted({r.contender for r in results if r.row.get("deterministic") is False})
    if shaky:
        ours = any(r.ours and r.row.get("deterministic") is False for r in results)
        text = f"Two runs on the same inputs differ for {_some(shaky)}."
        lines.append(Headline(text, "bad" if ours else "plain"))
    return [line for line in lines if line is not None]


def _worst(results: Sequence[Result], names: Sequence[str], words: str) -> Headline | None:
    """Our largest error beside the reference's, of those that are right."""
    groups = {
        "fastdaa": [result for result in results if result.ok and result.ours],
        "plain PyTorch": [r for r in results if r.ok and r.contender == "pytorch"],
    }
    worst = {
        who: max(
            (r.errors[name] for r in members for name in names if name in r.errors), default=None
        )
        for who, members in groups.items()
    }
    ours, theirs = worst.values()
    if ours is None or theirs is None:
        return None
    parts = [f"{error(value)} for {who}" for who, value in worst.items()]
    # Rounding is a matter of luck: only half as much again is a difference.
    tone = "good" if ours <= theirs else ("plain" if ours <= 1.5 * theirs else "bad")
    return Headline(f"{words}: {join(parts)}.", tone)


def _pace_words(gain: float) -> str:
    if gain >= 1:
        return f"is {three_digits(gain)} times as fast as"
    return f"takes {three_digits(1 / gain)} times as long as"


def _span(values: Sequence[float]) -> str:
    low, high = three_digits(min(values)), three_digits(max(values))
    return low if low == high else f"{low} to {high}"


def _cases(count: int) -> str:
    return "1 case" if count == 1 else f"{count} cases"


def _tone(gain: float) -> str:
    if gain > _NOISE:
        return "good"
    return "bad" if gain < 1 / _NOISE else "plain"


def _some(names: Sequence[str]) -> str:
    """The first few of a list, and how many there are beside them."""
    if len(names) <= _MOST_NAMES:
        return join(list(names))
    return join([*names[:_MOST_NAMES], f"{len(names) - _MOST_NAMES} more"])
