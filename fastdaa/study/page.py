"""The report's page: one HTML file that needs nothing else, for wide and narrow, light and dark."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastdaa.study.claims import Judged
from fastdaa.study.page_style import CSS

_SYMBOLS = {"reproduced": "✓", "partly": "◐", "not reproduced": "✗", "no data": "–"}  # noqa: RUF001


class PageFigure(NamedTuple):
    """A figure as the page shows it."""

    name: str
    title: str
    sentence: str
    wide_svg: str
    narrow_svg: str


class PageTable(NamedTuple):
    """A table of plain cells."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Page:
    """Everything that the page shows, as text."""

    title: str
    lead: str
    warning: str = ""
    """What has to be known before all else."""
    claims: Sequence[Judged] = ()
    figures: Sequence[PageFigure] = ()
    tables: Sequence[PageTable] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    """Parts that were not run, and what each needs."""
    missing_title: str = "Not run"
    facts: Mapping[str, str] = field(default_factory=dict)
    """Settings, versions, commit, command, seconds, cores."""


def render_page(page: Page) -> str:
    """The page as HTML. All text is escaped; nothing is loaded from elsewhere."""
    warning = f'<p class="warning">{_prose(page.warning)}</p>\n' if page.warning else ""
    sections = [
        _claims(page.claims),
        _figures(page.figures),
        _tables(page.tables),
        _missing(page.missing, page.missing_title),
        _facts(page.facts),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(page.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<header>\n{warning}<h1>{_text(page.title)}</h1>\n<p>{_prose(page.lead)}</p>\n"
        f"{_contents(page)}</header>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _prose(value: str) -> str:
    """Text in which what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(value))


def _contents(page: Page) -> str:
    places = []
    if page.claims:
        places.append(("claims", "Claims"))
    places += [(figure.name, figure.title) for figure in page.figures]
    if page.tables:
        places.append(("numbers", "Numbers"))
    if page.missing:
        places.append(("missing", page.missing_title))
    places.append(("facts", "How it was made"))
    links = "".join(
        f'<li><a href="#{_text(name)}">{_text(title)}</a></li>' for name, title in places
    )
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n'


def _box(label: str, table: str) -> str:
    """A table in a box of its own that scrolls sideways, by keyboard too."""
    return (
        f'<div class="scroll" role="region" aria-label="{_text(label)}" tabindex="0">{table}</div>'
    )


def _claims(claims: Sequence[Judged]) -> str:
    if not claims:
        return ""
    rows = []
    for claim in claims:
        kind = claim.verdict.replace(" ", "-")
        badge = f'<span class="verdict {kind}">{_SYMBOLS[claim.verdict]} {claim.verdict}</span>'
        rows.append(
            f"<tr><td>{_prose(claim.paper)}</td><td>{_prose(claim.measured)}</td><td>{badge}</td></tr>"
        )
    head = "<tr><th>Paper's claim</th><th>What we measured</th><th>Reproduced or not</th></tr>"
    table = f'<table class="claims"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
    return (
        '<section id="claims">\n<h2>Claims</h2>\n<p>Every line is computed from this study\'s own '
        "runs. The claims are those of Rafailov et al., “Scaling Laws for Reward Model "
        "Overoptimization in Direct Alignment Algorithms” (arXiv 2406.02900), whose models, data "
        f"and judge are other ones.</p>\n{_box('Claims', table)}\n</section>"
    )


def _figures(figures: Sequence[PageFigure]) -> str:
    parts = []
    for figure in figures:
        alt = f"{figure.title}. {figure.sentence}".replace("`", "")
        parts.append(
            f'<section id="{_text(figure.name)}">\n<h2>{_text(figure.title)}</h2>\n'
            f"<p>{_prose(figure.sentence)}</p>\n<picture>"
            f'<source media="(max-width: 640px)" srcset="{_data(figure.narrow_svg)}">'
            f'<img alt="{_text(alt)}" src="{_data(figure.wide_svg)}"></picture>\n</section>'
        )
    return "\n".join(parts)


def _data(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _tables(tables: Sequence[PageTable]) -> str:
    if not tables:
        return ""
    parts = []
    for table in tables:
        head = "".join(f"<th>{_text(cell)}</th>" for cell in table.head)
        rows = "".join(
            "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
            for row in table.rows
        )
        inner = (
            f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        )
        note = f"<p>{_prose(table.note)}</p>\n" if table.note else ""
        parts.append(
            f"<details>\n<summary>{_text(table.title)}</summary>\n{note}"
            f"{_box(table.title, inner)}\n</details>"
        )
    return '<section id="numbers">\n<h2>Numbers</h2>\n' + "\n".join(parts) + "\n</section>"


def _missing(missing: Mapping[str, str], title: str) -> str:
    if not missing:
        return ""
    items = "".join(
        f"<li><b>{_text(name)}</b>: needs {_prose(needs)}.</li>" for name, needs in missing.items()
    )
    return f'<section id="missing">\n<h2>{_text(title)}</h2>\n<ul>{items}</ul>\n</section>'


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>'
        for name, value in facts.items()
    )
    table = _box("How it was made", f'<table class="facts"><tbody>{rows}</tbody></table>')
    return f'<section id="facts">\n<h2>How it was made</h2>\n{table}\n</section>'
