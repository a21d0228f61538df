"""The tables of numbers below the report's figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastdaa.study.curves import LOSS_NAMES, Row, curve, series_name, split, sweeps
from fastdaa.study.fit_words import group_name
from fastdaa.study.page import PageTable
from fastdaa.study.results import Results
from fastdaa.study.wording import NO_VALUE, capitalised, join, number, preset_suffix

_COLUMNS = {
    "win_rate": ("win-rate", 3),
    "kl_forward": ("forward KL (nats)", 2),
    "entropy": ("entropy (nats)", 2),
    "length": ("length (tokens)", 2),
    "accuracy": ("accuracy", 3),
    "loss_value": ("held-out loss", 3),
}


def tables(results: Results) -> list[PageTable]:
    """Every table that the data allow."""
    ends = [_ends(preset, rows) for preset, rows in sweeps(results.rows).items()]
    found = [*ends, _fits(results), _correlations(results), _tree(results), _oracles(results)]
    return [table for table in found if table is not None]


def _ends(preset: Any, rows: Sequence[Row]) -> PageTable:
    """Last checkpoints by loss and beta, means over seeds."""
    columns = {
        name: words
        for name, words in _COLUMNS.items()
        if any(row.get(name) is not None for row in rows)
    }
    lines = []
    for name, group in split(rows, series_name).items():
        for point in curve(group):
            cells = [
                name if point.beta is not None else f"{name}, {point.rows[0]['run']}",
                NO_VALUE if point.beta is None else f"{point.beta:g}",
                str(len(point.rows)),
                number(point.distance),
                number(point.score, 3),
                number(point.stderr, 3),
            ]
            for column, (_, digits) in columns.items():
                values = [row[column] for row in point.rows if row.get(column) is not None]
                cells.append(number(statistics.fmean(values) if values else None, digits))
            lines.append(cells)
    head = ["series", "beta", "runs", "√KL (√nats)", "score", "standard error"]
    return PageTable(
        title=f"Ends of training{preset_suffix(preset)}",
        note="Means over the seeds of a beta.",
        head=[*head, *(words for words, _ in columns.values())],
        rows=lines,
    )


def _fits(results: Results) -> PageTable | None:
    lines = []
    for entry in results.fits.get("groups", ()):
        group = group_name(entry["group"])
        for fit in entry["fits"]:
            found, intervals = fit["coefficients"], fit["intervals"]
            lines.append(
                [
                    group,
                    fit["formula"],
                    number(fit["rmse"], 3),
                    number(fit["loo_rmse"], 3),
                    number(fit.get("far_rmse"), 3),
                    number(found["alpha"]) + _interval(intervals["alpha"]),
                    number(found["beta"]) + _interval(intervals["beta"]),
                    number(fit["peak"]["d"]) if fit["peak"] else "outside the data",
                ]
            )
    if not lines:
        return None
    confidence = results.fits.get("settings", {}).get("confidence", 0.95)
    units = join(sorted({str(entry["resampled"]) for entry in results.fits["groups"]}))
    notes = dict.fromkeys(note for entry in results.fits["groups"] for note in entry["notes"])
    words = (
        f"d is √KL. Brackets: {confidence:.0%} bootstrap intervals over {units}. Left out: error "
        "of each point under a fit without its unit. Far: error at the farthest third of the "
        "points under a fit to the others. A peak is given only inside the data."
    )
    return PageTable(
        title="Fitted laws",
        note=" ".join([words, *(f"{capitalised(note)}." for note in notes)]),
        head=["group", "law", "RMSE", "left out", "far", "alpha", "beta", "peak (√nats)"],
        rows=lines,
    )


def _correlations(results: Results) -> PageTable | None:
    lines = [
        [
            str(entry["x"]),
            ", ".join(str(value) for value in entry["group"].values()) or "all runs",
            str(entry["n"]),
            str(entry["runs"]),
            number(entry["pearson"]) + _interval(entry["pearson_interval"]),
            number(entry["spearman"]) + _interval(entry["spearman_interval"]),
        ]
        for entry in results.correlations.get("quality", ())
    ]
    if not lines:
        return None
    which = "last checkpoints" if results.correlations["settings"]["final_only"] else "checkpoints"
    return PageTable(
        title="Correlations with quality",
        note=f"Of all {which}; brackets: bootstrap intervals that draw whole runs."
        + (" IPO's loss_value times 4 beta²." if results.in_world else ""),
        head=["metric", "group", "checkpoints", "runs", "Pearson", "Spearman"],
        rows=lines,
    )


def _tree(results: Results) -> PageTable | None:
    lines = [
        [
            str(cell["pair"]).replace("_", " "),
            LOSS_NAMES.get(cell["loss"], cell["loss"]),
            f"{cell['beta']:g}",
            str(cell["seeds"]),
            f"{number(cell['start']['outside'])} to {number(cell['end']['outside'])}",
            f"{number(cell['start']['chosen'])} to {number(cell['end']['chosen'])}",
            f"{number(cell['start']['rejected'])} to {number(cell['end']['rejected'])}",
            number(cell["end"]["kl"]),
        ]
        for cell in results.tree.get("table", ())
    ]
    if not lines:
        return None
    return PageTable(
        title="Tree problem",
        note="Probabilities before and after training, means over seeds.",
        head=["pair", "loss", "beta", "seeds", "outside", "chosen", "rejected", "KL (nats)"],
        rows=lines,
    )


def _oracles(results: Results) -> PageTable | None:
    oracles: Sequence[Mapping[str, Any]] = results.tree.get("oracles", ())
    if not oracles:
        return None
    return PageTable(
        title="Problems with known solutions",
        note="Minima and fixed points of the library's losses against their closed forms; without "
        "a tolerance, the claim names its bound.",
        head=["claim", "error", "tolerance", "holds"],
        rows=[
            [
                str(oracle["claim"]),
                f"{oracle['error']:.1e}",
                NO_VALUE if oracle["tolerance"] is None else f"{oracle['tolerance']:.0e}",
                "yes" if oracle["holds"] else "no",
            ]
            for oracle in oracles
        ],
    )


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" [{number(ends[0])}, {number(ends[1])}]"
