"""The answers as tables of Markdown, which are as readable in a terminal: targets first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastdaa.benchmarks import wording
from fastdaa.benchmarks.contenders.fastdaa import LESS_BYTES
from fastdaa.benchmarks.gpu import questions as asked
from fastdaa.benchmarks.gpu.answers import Answers
from fastdaa.benchmarks.gpu.limits import accuracies, other_limits, shape_of, token_points
from fastdaa.benchmarks.gpu.targets import LESS_LIMIT, SUM_LIMIT
from fastdaa.benchmarks.reading import Result
from fastdaa.benchmarks.roof import Roof
from fastdaa.counted import counted

_PATH_OF = {name: path for path in asked.PATHS for name in asked.ours(path)}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with columns of equal width."""
    widths = [
        max(len(str(cell)) for cell in column) for column in zip(headings, *rows, strict=True)
    ]
    lines = [headings, ["-" * width for width in widths], *rows]
    return [
        "| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]


def sections(answers: Answers) -> dict[str, list[str]]:
    """Tables and words by title, the targets first; a part without rows is left out."""
    found = {
        _title(answers): _targets(answers),
        "Other limits": _other_limits(answers),
        "Engines": _engines(answers),
        f"Asked for {LESS_BYTES >> 20} MiB": _less(answers),
        "From few tokens to many": _scaling(answers),
        "Other vocabularies": _vocabularies(answers),
        "Accuracy": _accuracy(answers),
    }
    return {title: body for title, body in found.items() if body}


def as_lines(parts: Mapping[str, Sequence[str]]) -> list[str]:
    """Sections of a Markdown page."""
    return [line for title, body in parts.items() for line in (f"## {title}", "", *body, "")]


def _title(answers: Answers) -> str:
    case = answers.size.case
    result = next(iter(answers.results.values()), Result({}))
    named = ("torch", "triton", "trl", "driver")
    versions = [f"{name} {result.machine[name]}" for name in named if result.machine.get(name)]
    where = ", ".join([result.device, *versions, f"commit {result.commit}"])
    return f"{case.dtype}, N = {case.tokens}, V = {case.vocab}, D = {case.hidden}: {where}"


def _targets(answers: Answers) -> list[str]:
    cells = []
    for judged in answers.judged():
        target, best = judged.target, judged.result
        cells.append([
            f"{target.path} ({_engine(best)})" if best else target.path,
            f"{wording.ratio(best.over_floor if best else None)} {target.products}U",
            f"at most {target.over_floor:.2f}",
            wording.ratio(judged.against_trl),
            f"at least {target.against_trl:.2f}",
            wording.size(best.peak if best else None),
            f"at most {wording.size(target.extra_bytes)}",
            judged.verdict,
        ])  # fmt: skip
    headings = ["path", "time over floor", "limit", "against TRL", "limit", "extra memory", "limit",
                "verdict"]  # fmt: skip
    floors = [answers.of("recompute", f"floor-{n}u") for n in (1, 2, 3, 4)]
    floor = ", ".join(
        f"{n}U {wording.duration(f.median)}" for n, f in enumerate(floors, 1) if f is not None
    )
    trl = [answers.of(path, "trl") for path in asked.PATHS]
    said = {f"TRL {r.status}: {r.reason}" for r in trl if r is not None and not r.ok}
    used = ", ".join(wording.size(r.peak) for r in trl if r is not None and r.ok)
    return [
        *table(headings, cells), "",
        f"Floor (the bare products in the same run): {floor or 'not measured'}. TRL's extra memory "
        f"({', '.join(asked.PATHS)}): {used or 'not measured'}.",
        *_roofs(answers),
        *sorted(said), *_left_out(answers.left_out),
    ]  # fmt: skip


def _other_limits(answers: Answers) -> list[str]:
    cells = [
        [verdict.question, verdict.subject.removeprefix("fastdaa-"), verdict.found, verdict.verdict]
        for verdict in other_limits(answers)
    ]
    return table(["asked", "of", "found", "verdict"], cells)


def _roofs(answers: Answers) -> list[str]:
    """What the times by the model were computed with: one roof a process."""
    found = [r.row["roof"] for r in answers.results.values() if r.row.get("roof")]
    words = dict.fromkeys(Roof(**roof).words for roof in found)
    return (
        [f"Roof of the model ({counted(len(words), 'process')}): {'; '.join(words)}."]
        if words
        else []
    )


def _left_out(count: int) -> list[str]:
    return [f"Rows of other code or versions, left out here: {count}."] if count else []


def _engine(result: Result) -> str:
    path = _PATH_OF[result.contender]
    return result.contender.removeprefix(f"fastdaa-{path.replace('_', '-')}").lstrip("-") or "torch"


def _engines(answers: Answers) -> list[str]:
    cells, words = [], []
    for path in asked.PATHS:
        found, trl = answers.ours(path), answers.of(path, "trl")
        for result in found:
            against = _against(result, trl)
            cells.append([
                path, _engine(result), wording.duration(result.median if result.ok else None),
                wording.duration(result.row.get("expected_seconds")),
                wording.ratio(result.over_floor), against, wording.size(result.peak),
                _state(result),
            ])  # fmt: skip
        right = sorted((r for r in found if r.ok and r.median), key=lambda r: r.median or 0.0)
        words += [_fastest(path, right)] if right else []
    if not cells:
        return []
    headings = ["path", "engine", "median", "by the model", "over floor", "against TRL",
                "extra memory", "state"]  # fmt: skip
    return [*table(headings, cells), "", *words]


def _fastest(path: str, right: Sequence[Result]) -> str:
    """One line that ``auto`` can be decided by; the results are sorted by time."""
    first, *others = right
    least = first.median or 1.0
    slower = "".join(
        f"; {_engine(other)} takes {(other.median or 0.0) / least:.2f} times as long"
        for other in others
    )
    return f"- {path}: {_engine(first)} is the fastest{slower}"


def _against(result: Result, trl: Result | None) -> str:
    if trl is None or not (trl.ok and trl.median and result.ok and result.median):
        return "-"
    return wording.ratio(trl.median / result.median)


def _state(result: Result) -> str:
    return result.status if result.ok else f"{result.status.upper()}: {result.reason[:100]}"


def _less(answers: Answers) -> list[str]:
    cells = []
    for path in asked.PATHS:
        for name in asked.less(path):
            result = answers.of(path, name)
            if result is None:
                continue
            fine = result.ok and result.peak is not None and result.peak <= LESS_LIMIT
            verdict = ("met" if fine else "missed") if result.ok else _state(result)
            cells.append([
                path, name, wording.size(result.peak), f"at most {wording.size(LESS_LIMIT)}",
                wording.duration(result.median), wording.ratio(result.over_floor), verdict,
            ])  # fmt: skip
    headings = ["work of", "contender", "extra memory", "limit", "median", "over floor", "verdict"]
    return table(headings, cells) if cells else []


def _scaling(answers: Answers) -> list[str]:
    sizes, cells = answers.token_counts(), []
    for path in asked.PATHS:
        for name in asked.ours(path):
            points = token_points(answers, path, name)
            times = {point.tokens: wording.duration(point.seconds) for point in points}
            if set(times) - {answers.size.case.tokens}:
                shown = [times.get(n, "-") for n in sizes]
                cells.append([name.removeprefix("fastdaa-"), *shown, *shape_of(points, answers)])
    headings = ["contender", *(f"N = {n}" for n in sizes), "time", "memory"]
    return table(headings, cells) if cells else []


def _vocabularies(answers: Answers) -> list[str]:
    cells = []
    for head in answers.size.heads:
        for path in asked.PATHS:
            trl = answers.of(path, "trl", head=head)
            for result in answers.ours(path, head=head):
                params = result.params
                cap = f", softcap {params['softcap']:g}" if params.get("softcap") else ""
                cells.append([
                    f"{params['V']}{cap}", path, _engine(result),
                    wording.duration(result.median if result.ok else None),
                    wording.ratio(result.over_floor), _against(result, trl),
                    wording.size(result.peak), _state(result),
                ])  # fmt: skip
    headings = ["V", "path", "engine", "median", "over floor", "against TRL", "extra memory",
                "state"]  # fmt: skip
    return table(headings, cells) if cells else []


def _accuracy(answers: Answers) -> list[str]:
    """The contract: sums of log-probs, and gradients beside those of materialised logits."""
    cells = [
        [
            case, name.removeprefix("fastdaa-"), wording.error(total),
            *(f"{wording.error(e)} / {wording.error(least)}" for e, least in gradients), verdict,
        ]
        for case, name, total, gradients, verdict in accuracies(answers)
    ]  # fmt: skip
    headings = ["case", "contender", f"largest sum of 512 (at most {SUM_LIMIT:g} nat)",
                "dH / with logits", "dW / with logits", "verdict"]  # fmt: skip
    return table(headings, cells) if cells else []
