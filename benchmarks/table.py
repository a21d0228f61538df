"""Results as tables in the terminal; what is wrong is red and has no speed-up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from fastdaa.benchmarks.columns import columns_for
from fastdaa.benchmarks.mixed_runs import mixed_runs
from fastdaa.benchmarks.reading import Result, by_case, case_details, case_title, latest, ranked
from fastdaa.benchmarks.wording import error

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {"wrong": "bold red", "failed": "red", "absent": "dim", "skipped": "dim"}
_PADDING = 3


def show(
    rows: Iterable[Mapping[str, Any]], *, title: str = "", console: Console | None = None
) -> None:
    """Prints one table a kind of benchmark, and below it every contender that did not run.

    The newest of several rows for the same contender and case is shown.
    """
    from rich.console import Console

    console = console or Console()
    results = latest(rows)
    if not results:
        console.print("no rows: nothing was measured")
    kinds = dict.fromkeys((result.device, result.kind) for result in results)
    for device, kind in kinds:
        chosen = [result for result in results if (result.device, result.kind) == (device, kind)]
        console.print(f"\n{title or kind} on {device}", style="bold", highlight=False, markup=False)
        for part in build(kind, chosen):
            _print_whole(console, part)
        for line in [*notes(chosen), *mixed_runs(chosen)]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_whole(console: Console, table: Table) -> None:
    """A narrow terminal may wrap lines, but no number is cut off."""
    wanted = sum((column.min_width or 0) + _PADDING for column in table.columns) + _PADDING
    width = console.width
    console.width = max(width, wanted)
    console.print(table)
    console.width = width


def build(kind: str, results: Iterable[Result]) -> list[Table]:
    """One table a case, right contenders by time; contenders that did not run are in `notes`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    ran = [result for result in results if result.measured or result.status == "failed"]
    columns = columns_for(kind, ran)
    # The same widths in all of them, so that the eye can go down a column.
    widths = [
        max(len(words) for words in (column.heading, *map(column.cell, ran))) for column in columns
    ]
    tables = []
    for case, members in by_case(ran).items():
        words = f"{case_title(members[0])}, {case_details(members[0])}".rstrip(", ")
        title = Text(f"{case}\n{words}")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for column, width in zip(columns, widths, strict=True):
            justify: Literal["left", "right"] = "right" if column.number else "left"
            table.add_column(column.heading, justify=justify, min_width=width, no_wrap=True)
        for result in ranked(members):
            cells = (Text(column.cell(result)) for column in columns)
            table.add_row(*cells, style=_STYLES.get(result.status))
        tables.append(table)
    return tables


def notes(results: Iterable[Result]) -> list[str]:
    """Lines on what is wrong, failed, absent or skipped, with the reasons, each said once."""
    results, said = list(results), dict[str, list[str]]()
    for result in results:
        if not result.ok:
            said.setdefault(_note(result), []).append(result.case)
    everywhere = len({result.case for result in results})
    return [
        line if len(set(cases)) == everywhere else f"{line} [{', '.join(cases)}]"
        for line, cases in said.items()
    ]


def _note(result: Result) -> str:
    if result.status == "wrong":
        errors = ", ".join(f"{name} {error(value)}" for name, value in result.errors.items())
        return f"{result.contender} is WRONG: {result.reason or errors}"
    return f"{result.contender} {result.status}: {result.reason or 'no reason given'}"
