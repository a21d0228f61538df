"""What runs now: one changing line in a terminal, a line each where there is none."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Tell = Callable[[str], None]


@contextlib.contextmanager
def progress(subject: str) -> Iterator[Tell]:
    """A function that is told what runs now; ``subject`` stands before its words.

    Lines that are not in a terminal have the seconds since the beginning. What only adds to the
    line before (``timing``, ``timing, round 3``) is left out there.
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    if console.is_terminal:
        # Drawing takes the interpreter from whoever is timed: once a second is enough.
        with console.status(escape(subject), refresh_per_second=1) as status:
            yield lambda line: status.update(escape(f"{subject}: {line}"))
        return
    began, last = time.monotonic(), ""

    def tell(line: str) -> None:
        nonlocal last
        if line == last or line.startswith(f"{last}, "):
            return
        last = line
        seconds = time.monotonic() - began
        print(f"{seconds:5.0f} s  {subject}: {line}", file=sys.stderr, flush=True)

    yield tell
