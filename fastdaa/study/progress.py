"""Progress of many tasks: bars with count, rate and time left, or lines where there is no bar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@dataclass
class _Kind:
    total: int
    bar: Any
    done: int = 0
    first: float | None = None
    """When the first task was done."""


class Bars:
    """Shows how far things are; see :func:`bars`.

    Args:
        console: None to show nothing.
        progress: bars, on a terminal.
    """

    def __init__(self, console: Console | None, progress: Progress | None) -> None:
        self._console, self._progress = console, progress
        self._kinds: dict[str, _Kind] = {}

    def add(self, kind: str, total: int) -> None:
        """Another kind of tasks."""
        bar = None
        if self._progress is not None:
            bar = self._progress.add_task(kind, total=total, rate="", note="")
        self._kinds[kind] = _Kind(total, bar)

    def advance(self, kind: str, note: str) -> None:
        """One more task of that kind is done; ``note`` says something about it."""
        state = self._kinds[kind]
        state.done += 1
        if self._progress is None or state.bar is None:
            self.say(f"{kind} {state.done}/{state.total}  {note}")
            return
        # From the first result on: before it, workers start and other kinds of tasks run.
        now = time.perf_counter()
        state.first = state.first or now
        rate = f"{60 * (state.done - 1) / (now - state.first):.1f}/min" if state.done > 1 else ""
        self._progress.update(state.bar, completed=state.done, rate=rate, note=note)

    def reach(self, kind: str, done: int) -> None:
        """So many tasks of that kind are done; shown on a terminal only."""
        state = self._kinds[kind]
        state.done = done
        if self._progress is not None and state.bar is not None:
            self._progress.update(state.bar, completed=done)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bars(console: Console | None) -> Iterator[Bars]:
    """Bars on ``console`` if it is a terminal, lines if it is a file, nothing if it is None."""
    if console is None or not console.is_terminal:
        yield Bars(console, None)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("  {task.description:<10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        # A run takes seconds: an estimate needs more than the usual half a minute of them.
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, speed_estimate_period=300) as progress:
        yield Bars(console, progress)
