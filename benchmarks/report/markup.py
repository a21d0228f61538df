"""The page's HTML: escaped words, tables that scroll in their box, and the style sheet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fastdaa.benchmarks.report.palette import style_sheet

_STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1160px;margin:0 auto;padding:28px 16px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.35rem;margin:52px 0 6px;padding-top:18px;border-top:1px solid var(--grid)}
h3{font-size:1.05rem;margin:28px 0 6px}
p,li,dd{max-width:74ch}
p{margin:8px 0}
.sub,figcaption,.small{color:var(--muted);font-size:.875rem}
nav{margin:14px 0 22px;display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.9rem}
a{color:var(--fastdaa)}
ul.said{list-style:none;margin:14px 0;padding:0;display:grid;gap:8px}
ul.said li{max-width:none;padding:9px 14px;background:var(--panel);
border-left:4px solid var(--muted);border-radius:0 6px 6px 0;overflow-wrap:anywhere}
ul.said b{display:block;font-size:.8rem;color:var(--muted);font-weight:600}
ul.said li.good{border-color:var(--good)}
ul.said li.bad{border-color:var(--wrong)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(350px,100%),1fr));
gap:22px 26px;margin:18px 0;align-items:start}
figure{margin:0;min-width:0}
figure svg{display:block;width:100%;height:auto}
figcaption{margin:0 0 4px;color:var(--ink);font-weight:600;overflow-wrap:anywhere}
figcaption span{display:block;font-weight:400;color:var(--muted)}
.box{overflow-x:auto;border:1px solid var(--grid);border-radius:6px;margin:10px 0}
table{border-collapse:collapse;font-size:.85rem;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:5px 8px;text-align:left;white-space:nowrap;border-bottom:1px solid var(--grid)}
td.wide{white-space:normal;min-width:240px;overflow-wrap:anywhere}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-weight:600;white-space:normal;vertical-align:bottom}
.number{text-align:right}
th.case{background:var(--panel);font-weight:600}
th.case span{position:sticky;left:8px;display:inline-block;white-space:normal;
max-width:min(78vw,1080px)}
tr.ours td:first-child{color:var(--fastdaa);font-weight:600}
tr.wrong td,tr.failed td,td.bad{color:var(--wrong)}
tr.wrong td:last-child,td.bad{font-weight:700}
td.good{color:var(--good);font-weight:600}
tr.floor td{color:var(--muted)}
details{margin:10px 0}
summary{cursor:pointer;color:var(--fastdaa);font-size:.95rem}
dl{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:7px 20px;margin:12px 0}
dt{font-weight:600}
dd{margin:0;min-width:0;overflow-wrap:anywhere}
code{font:.85em ui-monospace,monospace;overflow-wrap:anywhere}
@media (max-width:560px){h1{font-size:1.55rem}dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:10px}th,td{padding:5px 7px}}
"""


def document(title: str, body: str) -> str:
    """A whole page that needs no other file."""
    style = (style_sheet() + _STYLE).replace("\n", "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain words."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def said(lines: Iterable[tuple[str, str, str]]) -> str:
    """Headlines as (label, text, tone); nothing if there are none."""
    items = ""
    for label, text, tone in lines:
        above = f"<b>{escape(label)}</b>" if label else ""
        items += f'<li class="{escape(tone)}">{above}{escape(text)}</li>'
    return f'<ul class="said">{items}</ul>' if items else ""


def figure(caption: str, hint: str, svg: str) -> str:
    """A picture below its caption, which says what one sees."""
    label = escape(caption)
    drawing = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure><figcaption>{label}<span>{escape(hint)}</span></figcaption>{drawing}</figure>"


def pictures(figures: Sequence[str]) -> str:
    """Pictures side by side, as many as fit."""
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Words and what they mean."""
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in pairs) + "</dl>"


def cell(text: str, kind: str = "") -> str:
    """One cell of a table."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{escape(text)}</td>"


def table(headings: Sequence[tuple[str, bool]], body: str) -> str:
    """A table in a box of its own to scroll in; headings say whether they stand above numbers."""
    head = "".join(
        f"<th{' class=number' if number else ''}>{escape(text)}</th>" for text, number in headings
    )
    return (
        f'<div class="box" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, body: str, opened: bool) -> str:
    """Something that can be opened and closed."""
    return (
        f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{body}</details>"
    )
