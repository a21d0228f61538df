"""The end of the page: what did not run, and on what, with what and when the rest did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastdaa.benchmarks.reading import Result
from fastdaa.benchmarks.report import markup
from fastdaa.counted import counted

# Keys of a row's machine that are not versions of packages.
_PLACES = ("device", "driver", "cpu", "cores", "memory", "os")
_NOT_VERSIONS = (*_PLACES, "commit", "dirty", "changes")


def missing_table(results: Sequence[Result]) -> str:
    """Contenders that have no result, each reason once, with the cases that it concerns."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        if not result.ok:
            word = "WRONG" if result.status == "wrong" else result.status
            key = (result.contender, word, result.reason or "no reason given")
            reasons.setdefault(key, []).append(f"{result.kind} {result.case}")
    if not reasons:
        return markup.paragraph("Every contender ran on every case that it was asked for.")
    lines = []
    for (contender, word, reason), cases in sorted(reasons.items(), key=lambda item: item[0]):
        where = cases[0] if len(cases) == 1 else counted(len(cases), "case")
        tone = "bad" if word in ("WRONG", "failed") else ""
        cells = (
            markup.cell(contender),
            markup.cell(word, tone),
            markup.cell(where),
            markup.cell(reason, "wide"),
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    headings = [(text, False) for text in ("contender", "status", "where", "reason")]
    return markup.table(headings, "".join(lines))


def devices_table(rows: Sequence[Mapping[str, Any]], files: Sequence[str]) -> str:
    """Devices, versions, commits, seeds, times and commands of all rows."""
    machines = [row.get("machine") or {} for row in rows]
    pairs = [(name, _values(machines, name)) for name in _PLACES]
    versions = sorted({name for machine in machines for name in machine} - set(_NOT_VERSIONS))
    pairs += [(name, _values(machines, name)) for name in versions]
    pairs += [
        ("commit", _some(_commit(machine) for machine in machines if machine.get("commit"))),
        ("threads", _some(str(row["threads"]) for row in rows if row.get("threads"))),
        ("seed", _some(str(row["seed"]) for row in rows if row.get("seed") is not None)),
        ("measured", _times(rows)),
        ("rows from", ", ".join(files)),
    ]
    shown = markup.definitions((name, text) for name, text in pairs if text)
    commands = dict.fromkeys(str(row["command"]) for row in rows if row.get("command"))
    listed = "".join(f"<li><code>{escape(command)}</code></li>" for command in commands)
    return f"{shown}<h3>Commands</h3><ul>{listed}</ul>" if listed else shown


def _values(machines: Sequence[Mapping[str, Any]], name: str) -> str:
    return _some(str(m[name]) for m in machines if m.get(name) not in (None, ""))


def _commit(machine: Mapping[str, Any]) -> str:
    return f"{machine['commit']}{' with uncommitted changes' if machine.get('dirty') else ''}"


def _some(words: Any) -> str:
    return ", ".join(dict.fromkeys(words))


def _times(rows: Sequence[Mapping[str, Any]]) -> str:
    times = sorted(str(row["time"]) for row in rows if row.get("time"))
    return "" if not times else (times[0] if len(times) == 1 else f"{times[0]} to {times[-1]}")
