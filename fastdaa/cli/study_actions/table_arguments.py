"""Arguments that read a table: which files, which rows, what their columns are called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdaa.study.table import Table

_RENAMED = ("run", "checkpoint", "kl", "score")


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """The files, and the options that are the same wherever a table is read."""
    parser.add_argument(
        "tables", nargs="+", metavar="TABLE",
        help="a .jsonl or .csv file with run, checkpoint, kl (nats a sequence) and score, "
        "a study's folder, or the output folder of a tracked run or of `fastdaa online`",
    )  # fmt: skip
    parser.add_argument(
        "--score", default="score", metavar="COLUMN",
        help="column of the quality, e.g. gold or win_rate (default: score)",
    )  # fmt: skip
    parser.add_argument(
        "--final_only", action="store_true", help="only the last checkpoint of each run"
    )
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="COLUMN=VALUE",
        help="only these rows, e.g. --where preset=M size=d32",
    )  # fmt: skip
    for name in _RENAMED:
        parser.add_argument(
            f"--{name}_column", metavar="NAME", help=f"what {name} is called in the files"
        )
    parser.add_argument(
        "--duplicates", choices=("error", "last"), default="error",
        help="a run and checkpoint that comes twice: refuse it (default) or keep the last",
    )  # fmt: skip
    parser.add_argument(
        "--bootstrap", type=int, default=1000, help="resamples for intervals (default: 1000)"
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="confidence of intervals (default: 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")


def read(options: argparse.Namespace) -> Table:
    """The rows that the options ask for.

    Raises:
        FileNotFoundError, ValueError: files or filters that cannot be.
    """
    from fastdaa.study.table import read_table

    columns = {
        name: given
        for name in _RENAMED
        if (given := getattr(options, f"{name}_column")) is not None
    }
    table = read_table(
        options.tables, columns=columns, score=options.score, duplicates=options.duplicates
    )
    for condition in options.where:
        table = _filtered(table, condition)
    return table


def beside(options: argparse.Namespace, name: str) -> Path:
    """Where the result goes: ``--output``, else a file beside the first table.

    The file has this name beside the table of a study or a tracked run, and else the table's name
    before it: tables of one folder do not overwrite each other's results.
    """
    from fastdaa.study.table_files import TABLES

    if options.output is not None:
        return Path(options.output)
    first = Path(options.tables[0])
    if first.is_dir():
        return first / name
    return first.with_name(name if first.name in TABLES else f"{first.stem}_{name}")


def _filtered(table: Table, condition: str) -> Table:
    name, sign, wanted = condition.partition("=")
    if not sign or not name:
        raise ValueError(f"--where: expected COLUMN=VALUE, got {condition!r}")
    kept = table.where(lambda row: _same(row.get(name), wanted))
    if not len(kept):
        values = list(dict.fromkeys(str(row.get(name)) for row in table))
        raise ValueError(
            f"--where: expected a value of {name} ({', '.join(values[:8])}), got {wanted!r}"
        )
    return kept


def _same(value: object, wanted: str) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value) == float(wanted)
        except ValueError:
            return False
    return str(value).lower() == wanted.lower()
