"""One self-contained page about results, for people who have not read the code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fastdaa.benchmarks.columns import columns_for
from fastdaa.benchmarks.compare import result as comparison
from fastdaa.benchmarks.mixed_runs import mixed_runs
from fastdaa.benchmarks.reading import (
    KINDS,
    Result,
    by_case,
    case_details,
    case_title,
    latest,
    ranked,
)
from fastdaa.benchmarks.report import markup
from fastdaa.benchmarks.report.explaining import GLOSSARY, INTRODUCTION, KIND_TEXTS, KIND_TITLES
from fastdaa.benchmarks.report.figures import Picture
from fastdaa.benchmarks.report.headlines import Headline, headlines, verdict
from fastdaa.benchmarks.report.provenance import devices_table, missing_table
from fastdaa.counted import counted

_MOST_OPEN_ROWS = 40
Draw = Callable[[str, Sequence[Result], str], list[Picture]]


def build(rows: Sequence[Mapping[str, Any]], files: Sequence[str], draw: Draw) -> str:
    """The page of all rows of ``files``; pictures come from ``draw(kind, results, device)``.

    Raises:
        ValueError: without a row.
    """
    results = latest(rows)
    compared = _latest_comparisons(rows)
    if not results and not compared:
        raise ValueError("expected at least one row of results, got none")
    devices = list(dict.fromkeys(result.device for result in results))
    parts = [
        "<header><h1>fastdaa, measured</h1>",
        markup.paragraph(_where(devices, rows), "sub"),
        _navigation(results, bool(compared)),
        "</header>",
        *(markup.paragraph(text) for text in INTRODUCTION),
        _summary(results, devices),
    ]
    for place, device in enumerate(devices):
        chosen = [result for result in results if result.device == device]
        for kind in KINDS:
            members = [result for result in chosen if result.kind == kind]
            if members:
                parts.append(_section(kind, members, device, place, len(devices) > 1, draw))
    if compared:
        parts.append(_comparisons(compared))
    parts += [
        '<h2 id="missing">What did not run</h2>',
        missing_table(results),
        '<h2 id="words">Words</h2>',
        markup.definitions(GLOSSARY),
        '<h2 id="origin">Where the numbers come from</h2>',
        devices_table(rows, files),
    ]
    return markup.document("fastdaa, measured", "\n".join(parts))


def _where(devices: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    days = sorted({str(row["time"])[:10] for row in rows if row.get("time")})
    when = "" if not days else f" · {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "")
    return f"{' · '.join(devices)}{when}"


def _navigation(results: Sequence[Result], compared: bool) -> str:
    present = {result.kind for result in results}
    links = [(kind, KIND_TITLES[kind]) for kind in KINDS if kind in present]
    links += [("versions", "Two versions")] if compared else []
    links += [("missing", "What did not run"), ("words", "Words"), ("origin", "Origin")]
    listed = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in links)
    return f"<nav>{listed}</nav>"


def _summary(results: Sequence[Result], devices: Sequence[str]) -> str:
    """What every kind says first and where fastdaa is behind; the rest is in the sections."""
    lines: list[tuple[str, Headline]] = []
    for device in devices:
        where = f" ({device})" if len(devices) > 1 else ""
        for kind in KINDS:
            members = [r for r in results if (r.device, r.kind) == (device, kind)]
            lines += [(f"{KIND_TITLES[kind]}{where}", line) for line in _first(kind, members)]
    if results:
        lines.append(("Correctness", verdict(results)))
    return markup.said((label, line.text, line.tone) for label, line in lines)


def _first(kind: str, members: Sequence[Result]) -> list[Headline]:
    found = headlines(kind, members)
    return found[:1] + [line for line in found[1:2] if line.tone == "bad"]


def _section(
    kind: str, members: Sequence[Result], device: str, place: int, named: bool, draw: Draw
) -> str:
    anchor = kind if place == 0 else f"{kind}-{place}"
    drawn = draw(kind, members, "" if place == 0 else str(place))
    figures = [markup.figure(p.title, p.details, p.svg()) for p in drawn]
    ran = [result for result in members if result.measured or result.status == "failed"]
    said = _first(kind, members)
    rest = [line for line in headlines(kind, members) if line not in said]
    summary = f"All numbers: {counted(len(ran), 'row')}"
    return "\n".join(
        [
            f'<h2 id="{anchor}">{escape(KIND_TITLES[kind])}</h2>',
            markup.paragraph(device, "sub") if named else "",
            markup.paragraph(KIND_TEXTS[kind]),
            markup.said(("", line.text, line.tone) for line in rest),
            *(markup.paragraph(line, "small") for line in mixed_runs(members)),
            markup.pictures(figures),
            markup.folded(summary, numbers(kind, ran), len(ran) <= _MOST_OPEN_ROWS),
        ]
    )


def numbers(kind: str, results: Sequence[Result]) -> str:
    """The table of a kind: a band a case, contenders by rank, wrong ones in red and unranked."""
    columns = columns_for(kind, results)
    lines = []
    for case, members in by_case(results).items():
        words = f"{case_title(members[0])}, {case_details(members[0])}".rstrip(", ")
        band = f"<span>{escape(words)}<br><code>{escape(case)}</code></span>"
        lines.append(f'<tr><th class="case" colspan="{len(columns)}">{band}</th></tr>')
        for result in ranked(members):
            cells = "".join(
                markup.cell(column.cell(result), "number" if column.number else "")
                for column in columns
            )
            lines.append(f'<tr class="{_row_class(result)}">{cells}</tr>')
    return markup.table([(column.heading, column.number) for column in columns], "".join(lines))


def _row_class(result: Result) -> str:
    if result.status in ("wrong", "failed"):
        return result.status
    return "ours" if result.ours else ("floor" if result.family == "floor" else "")


def _latest_comparisons(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    newest = {
        (row["of"], row["case"], row["contender"], row["base"], row["new"]): row
        for row in rows
        if row["kind"] == "compare"
    }
    return list(newest.values())


def _comparisons(rows: Sequence[Mapping[str, Any]]) -> str:
    tones = {"slower": "bad", "WRONG": "bad", "failed": "bad", "faster": "good"}
    lines, reasons = [], []
    for row in rows:
        *words, verdict_word = comparison.cells(dict(row))
        cells = [markup.cell(f"{row['base']} / {row['new']}")]
        cells += [markup.cell(word, "number" if i > 1 else "") for i, word in enumerate(words)]
        cells.append(markup.cell(verdict_word, tones.get(verdict_word, "")))
        lines.append(f"<tr>{''.join(cells)}</tr>")
        if row.get("reason"):
            reasons.append(f"{row['contender']} on {row['case']}: {row['reason']}")
    headings = [("base / new", False)]
    headings += [(h, 1 < i < 7) for i, h in enumerate(comparison.HEADINGS)]
    return "\n".join(
        [
            '<h2 id="versions">Two versions of fastdaa</h2>',
            markup.paragraph(KIND_TEXTS["compare"]),
            markup.table(headings, "".join(lines)),
            *(markup.paragraph(reason, "small") for reason in reasons),
        ]
    )
