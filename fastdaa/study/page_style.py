"""The style sheet of the report's page."""

from __future__ import annotations

from fastdaa.study.figures.style import DARK, GRID, INK, MUTED, PAPER

CSS = f"""
:root {{
  color-scheme: light dark;
  --ink: {INK}; --muted: {MUTED}; --line: {GRID}; --paper: {PAPER}; --link: #0b62a8;
  --good: #0a6b45; --good-paper: #e2f4ec; --half: #7a5200; --half-paper: #fdf1d6;
  --bad: #a03c12; --bad-paper: #fbe7df; --none: #4b5560; --none-paper: #edf0f3;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --ink: {DARK[INK]}; --muted: {DARK[MUTED]}; --line: {DARK[GRID]}; --paper: {DARK[PAPER]};
    --link: #7cc0f5; --good: #6fdcae; --good-paper: #12362a; --half: #f0c866;
    --half-paper: #3a2f12; --bad: #ffa787; --bad-paper: #43241a; --none: #b6bfc9;
    --none-paper: #262c34;
  }}
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}}
main {{ max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0.4em 0; }}
.warning {{
  max-width: none; padding: 8px 14px; border-radius: 8px; font-weight: 600;
  color: var(--bad); background: var(--bad-paper);
}}
h2 {{ font-size: 1.25rem; line-height: 1.3; margin: 0 0 0.4em; }}
p {{ max-width: 78ch; margin: 0 0 1em; overflow-wrap: break-word; }}
section {{ border-top: 1px solid var(--line); padding-top: 24px; margin-top: 32px; }}
a {{ color: var(--link); }}
code {{ font: 0.88em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }}
nav ul {{ list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: 4px 18px; }}
nav li {{ font-size: 0.92rem; }}
picture img {{ display: block; max-width: 100%; height: auto; margin: 0 auto; }}
.scroll {{ overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }}
.scroll:focus-visible {{ outline: 2px solid var(--link); }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.93rem; }}
th, td {{ text-align: left; vertical-align: top; padding: 9px 14px; }}
tr + tr td, tr + tr th, thead + tbody tr:first-child td {{ border-top: 1px solid var(--line); }}
table.claims td:first-child {{ width: 32%; }}
table.claims td:last-child {{ width: 10.5rem; }}
table.numbers {{ font-variant-numeric: tabular-nums; }}
table.numbers th, table.numbers td {{ white-space: nowrap; padding: 5px 12px; text-align: right; }}
table.facts th {{ white-space: nowrap; font-weight: 600; }}
table.facts td {{ overflow-wrap: anywhere; min-width: 240px; }}
.verdict {{
  display: inline-block; padding: 1px 10px; border-radius: 999px; font-size: 0.86rem;
  font-weight: 600; white-space: nowrap;
}}
.reproduced {{ color: var(--good); background: var(--good-paper); }}
.partly {{ color: var(--half); background: var(--half-paper); }}
.not-reproduced {{ color: var(--bad); background: var(--bad-paper); }}
.no-data {{ color: var(--none); background: var(--none-paper); }}
details {{ margin: 0 0 14px; }}
summary {{ cursor: pointer; padding: 6px 0; font-weight: 600; }}
@media (max-width: 640px) {{
  main {{ padding: 12px 14px 48px; }}
  h1 {{ font-size: 1.5rem; }}
  body {{ font-size: 15px; }}
  /* A claim, what was measured and the verdict below each other: nothing to scroll to. */
  table.claims, table.claims tbody, table.claims tr, table.claims td {{ display: block; }}
  table.claims thead {{ display: none; }}
  table.claims tbody tr td, table.claims tbody tr td:first-child {{
    width: auto; padding: 3px 12px; border-top: 0;
  }}
  table.claims tbody tr td:first-child {{ font-weight: 600; padding-top: 12px; }}
  table.claims tbody tr td:last-child {{ width: auto; padding-bottom: 12px; }}
  table.claims tr + tr {{ border-top: 1px solid var(--line); }}
  table.facts tbody, table.facts tr, table.facts th, table.facts td {{ display: block; }}
  table.facts th {{ padding-bottom: 0; }}
  table.facts td {{ min-width: 0; padding-top: 0; border-top: 0; }}
}}
@media print {{ .scroll {{ overflow: visible; }} details > * {{ display: block; }} }}
"""
