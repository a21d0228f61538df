"""``fastdaa study fit``: laws of quality against distance, fitted to any table of checkpoints.

R(d) = d (alpha - beta log d), d (alpha - beta d) and KL (alpha - beta KL), each with and without
intercept, where d = sqrt(KL) and R is the score over the reference's. Peaks are reported only
inside the data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from fastdaa.cli.study_actions.table_arguments import add_table_arguments, beside, read
from fastdaa.counted import counted

_MANY = 6
"""With more groups than this, fits with intercept are printed only where they are best."""

_COLUMNS = {"law": 8, "alpha": 6, "beta": None, "RMSE": 7, "left out": 8, "peak d": None}
"""With their least widths, so that the groups' tables stand in line; rich would cut what is wider
than the terminal if columns that can be broken had one, too."""

HELP = "fit laws of quality against KL to a table, with intervals and peaks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the action."""
    add_table_arguments(parser)
    parser.add_argument(
        "--group", nargs="*", metavar="COLUMN",
        help="one fit for each value of these columns; without a column, one fit of all rows "
        "(default: what varies of preset, size, algorithm, whitened, loss, length_alpha, seed)",
    )  # fmt: skip
    parser.add_argument(
        "--offset", type=float, metavar="SCORE",
        help="the reference's score (default: 0 for gold, else that of the rows at KL = 0; without "
        "such rows 0.5 for win_rate, else 0)",
    )  # fmt: skip
    parser.add_argument(
        "--laws", nargs="+", default=["log", "d", "kl"], help="laws to fit (default: log d kl)"
    )
    parser.add_argument(
        "--resample", choices=("auto", "points", "runs", "seeds"), default="auto",
        help="what the bootstrap draws, and what is left out for the error of prediction (default: "
        "seeds if a group has three, else runs if it has five, else points)",
    )  # fmt: skip
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="JSON file (default: fits.json in the folder of a study or run, else TABLE_fits.json)",
    )
    parser.add_argument(
        "--csv", metavar="FILE", help="the same as a table, too: one row a group and law"
    )


def run(options: argparse.Namespace) -> int:
    """Fits, prints and writes; 0, or 1 where no group has enough points."""
    from rich.console import Console

    from fastdaa.study.fit import FitSettings, fit_table
    from fastdaa.study.fit_rows import write_fits_csv
    from fastdaa.study.json_file import write_json

    settings = FitSettings(
        score=options.score,
        offset=options.offset,
        group=None if options.group is None else tuple(options.group),
        final_only=options.final_only,
        laws=tuple(options.laws),
        repeats=options.bootstrap,
        confidence=options.confidence,
        resample=options.resample,
        seed=options.seed,
    )
    content = fit_table(read(options), settings)
    path = beside(options, "fits.json")
    write_json(path, content)
    fitted = [group for group in content["groups"] if group["fits"]]
    if options.csv is not None and fitted:
        write_fits_csv(options.csv, content)
    console = Console()
    if fitted:
        for group in fitted:
            console.print(_table(group, with_intercepts=len(fitted) <= _MANY))
        console.print(
            f"in brackets: {settings.confidence:.0%} intervals by bootstrap over {_units(fitted)} "
            "(open: beyond the data); RMSE, and left out, the error where a law was fitted without "
            "that point, run or seed: in units of the score; + c: with intercept; *: least error "
            "left out; outside: no peak inside the data",
            style="dim",
        )
    for sentence in content["summary"]:
        console.print(f"- {sentence}", highlight=False, markup=False)
    for note, names in _notes(content["groups"]).items():
        console.print(f"- {note} ({names})", highlight=False, markup=False)
    console.print(f"all fits and intervals: {path}", highlight=False, soft_wrap=True)
    return 0 if fitted else 1


def _units(groups: Sequence[Mapping[str, Any]]) -> str:
    """``runs``, or ``runs or points`` where groups differ."""
    return " or ".join(dict.fromkeys(str(group["resampled"]) for group in groups))


def _table(group: Mapping[str, Any], with_intercepts: bool) -> Any:
    """The fits of one group; those with intercept only on demand, or where one is best."""
    from rich.box import SIMPLE
    from rich.table import Table

    from fastdaa.study.fit_words import group_name

    table = Table(
        box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left",
        title=f"{group_name(group['group'])}: {counted(group['points'], 'point')}",
    )  # fmt: skip
    for name, width in _COLUMNS.items():
        # Too long for the terminal: onto a second line, never cut.
        table.add_column(
            name, justify="left" if name == "law" else "right", min_width=width, overflow="fold"
        )
    for place, fit in enumerate(group["fits"]):
        best = place == group["best"]
        if fit["intercept"] and not (with_intercepts or best):
            continue
        table.add_row(
            ("*" if best else " ") + fit["law"] + (" + c" if fit["intercept"] else ""),
            f"{fit['coefficients']['alpha']:.3g}",
            f"{fit['coefficients']['beta']:.3g}{_interval(fit['intervals']['beta'])}",
            f"{fit['rmse']:.3g}",
            f"{fit['loo_rmse']:.3g}",
            _peak(fit),
        )
    return table


def _interval(ends: Sequence[float | None] | None) -> str:
    if ends is None:
        return ""
    low, high = ("open" if end is None else _short(end) for end in ends)
    return f" ({low}, {high})"


def _short(value: float) -> str:
    """Two digits, or all before the point: an interval is rough."""
    return f"{value:.0f}" if 99.5 <= abs(value) < 1e5 else f"{value:.2g}"


def _peak(fit: Mapping[str, Any]) -> str:
    if fit["peak"] is None:
        return "outside"
    return f"{fit['peak']['d']:.3g}{_interval(fit['peak']['d_interval'])}"


def _notes(groups: list[dict[str, Any]]) -> dict[str, str]:
    """Each note once, with the groups that it belongs to."""
    from fastdaa.study.fit_words import group_name

    found: dict[str, list[str]] = {}
    for group in groups:
        for note in group["notes"]:
            found.setdefault(note, []).append(group_name(group["group"]))
    return {
        note: names[0] if len(names) == 1 else counted(len(names), "group")
        for note, names in found.items()
    }
