"""``fastdaa bench report``: pictures and one page from the rows of earlier runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdaa.benchmarks.reading import Result
    from fastdaa.benchmarks.report.figures import Picture

_COMMITTED = Path(__file__).parents[1] / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files to read and the folder to fill."""
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="JSON lines of `fastdaa bench` (default: the committed results of this checkout)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench_report"),
        metavar="DIR",
        help="gets index.html and figures/*.png (default: bench_report)",
    )


def run(options: argparse.Namespace) -> int:
    """Writes the page and the pictures; 0.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a broken line, with its file and number; no row at all. Half a row at the end of
            a file is left out, with a note on stderr.
        OSError: the folder cannot be written to.
    """
    from fastdaa.benchmarks.report.drawing import draw
    from fastdaa.benchmarks.report.page import build
    from fastdaa.benchmarks.rows import read_rows
    from fastdaa.whole_file import whole_file
    from fastdaa.writable import check_writable

    files = list(dict.fromkeys(options.files)) or sorted(_COMMITTED.glob("*.jsonl"))
    if not files:
        raise ValueError("expected FILE... (there are no committed results here), got none")
    rows = [row for file in files for row in read_rows(file)]
    check_writable(options.output, "--output")
    drawn: dict[Picture, str] = {}

    def keep(kind: str, results: Sequence[Result], prefix: str) -> list[Picture]:
        found = draw(kind, results, prefix)
        commits = ", ".join(dict.fromkeys(result.commit for result in results))
        drawn.update(dict.fromkeys(found, f"{results[0].device}; commit {commits}"))
        return found

    page = build(rows, [file.name for file in files], keep)
    folder = options.output / "figures"
    for picture, origin in drawn.items():
        with whole_file(folder / f"{picture.name}.png") as partial:
            partial.write_bytes(picture.png(origin))
    with whole_file(options.output / "index.html") as partial:
        partial.write_bytes(page.encode())
    counts = ", ".join(
        f"{len(some)} {name}{'s' * (len(some) != 1)}"
        for some, name in ((rows, "row"), (drawn, "picture"))
    )
    print(f"{options.output / 'index.html'} ({counts})")
    return 0
