"""The tree problem's runs as a table, as checks of what is expected, and as sentences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from fastdaa.counted import counted

Cell = Mapping[str, Any]
_TOLERANCE = 0.01
"""Masses closer than this are equal: at small beta all of them are 1 to the third digit."""


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, one row a cell, in the order of the runs."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        cells.setdefault((run["pair"], run["loss"], run["beta"]), []).append(run)

    def means(when: str, names: tuple[str, ...], cell: list[dict[str, Any]]) -> dict[str, float]:
        return {name: mean(run[when][name] for run in cell) for name in names}

    masses = ("outside", "chosen", "rejected")
    return [
        {
            "pair": pair,
            "loss": loss,
            "beta": beta,
            "seeds": len(cell),
            "start": means("start", masses, cell),
            "end": means("end", (*masses, "kl", "margin", "largest_outside"), cell),
            "outside_range": [
                min(run["end"]["outside"] for run in cell),
                max(run["end"]["outside"] for run in cell),
            ],
        }
        for (pair, loss, beta), cell in cells.items()
    ]


def check_cells(table: Sequence[Cell]) -> list[dict[str, Any]]:
    """What is expected of every pair, loss and beta that was run; an entry each of ``checks``.

    The mass outside rises in every cell only for the near-duplicate pair. What the other pair does
    is checked too: there, DPO's mass outside grows with beta.
    """
    checks = []
    near = [cell for cell in table if cell["pair"] == "near_duplicate"]
    if near:
        checks += [
            _all_cells(
                "outside_rises",
                "the mass outside the pair rises for every loss and beta",
                near,
                lambda cell: cell["end"]["outside"] > cell["start"]["outside"],
                lambda cell: f"{cell['start']['outside']:.2f} to {cell['end']['outside']:.2f}",
            ),
            _all_cells(
                "chosen_falls",
                "the chosen leaf itself becomes less probable for every loss and beta",
                near,
                lambda cell: cell["end"]["chosen"] < cell["start"]["chosen"],
                lambda cell: f"{cell['start']['chosen']:.2f} to {cell['end']['chosen']:.2f}",
            ),
            _trend("outside_falls_with_beta", near, _losses(near), rising=False),
        ]
        checks += _ipo_least(near)
    checks += _ipo_targets(table)
    other = [cell for cell in table if cell["pair"] == "different_start" and cell["loss"] == "dpo"]
    if len(other) > 1:
        checks.append(_trend("trend_depends_on_the_pair", other, ["dpo"], rising=True))
    return checks


def describe_cells(table: Sequence[Cell]) -> list[str]:
    """One sentence a pair and loss, and one on how much the pair decides."""
    sentences = []
    for pair in _pairs(table):
        for loss in _losses(cells := [cell for cell in table if cell["pair"] == pair]):
            ours = sorted((c for c in cells if c["loss"] == loss), key=lambda cell: cell["beta"])
            ends = ", ".join(f"{c['end']['outside']:.2f} at beta {c['beta']:g}" for c in ours)
            start = mean(c["start"]["outside"] for c in ours)
            sentences.append(
                f"Pair {pair}, {loss}: mass outside from {start:.2f} before training to {ends}."
            )
    trends = [_more_outside_at_small_beta(table, pair) for pair in _pairs(table)]
    if len(trends) > 1 and len({cell["beta"] for cell in table}) > 1:
        sentences.append(
            f"The smallest beta leaves more mass outside than the largest: {'; '.join(trends)}."
        )
    return sentences


def _losses(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell["loss"] for cell in cells))


def _pairs(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell["pair"] for cell in cells))


def _more_outside_at_small_beta(table: Sequence[Cell], pair: str) -> str:
    """In how many of a pair's losses the smallest beta leaves more outside than the largest."""
    losses, more = _losses(cells := [cell for cell in table if cell["pair"] == pair]), 0
    for loss in losses:
        ours = sorted((c for c in cells if c["loss"] == loss), key=lambda cell: cell["beta"])
        more += ours[0]["end"]["outside"] > ours[-1]["end"]["outside"]
    return f"in {more} of {counted(len(losses), 'loss')} for pair {pair}"


def _name(cell: Cell) -> str:
    return f"{cell['loss']} beta {cell['beta']:g}"


def _all_cells(
    name: str,
    claim: str,
    cells: Sequence[Cell],
    holds: Callable[[Cell], bool],
    shown: Callable[[Cell], str],
) -> dict[str, Any]:
    wrong = [cell for cell in cells if not holds(cell)]
    listed = "; ".join(f"{_name(cell)}: {shown(cell)}" for cell in wrong or cells)
    return {"name": name, "claim": claim, "holds": not wrong, "detail": listed}


def _trend(
    name: str, cells: Sequence[Cell], losses: Sequence[str], *, rising: bool
) -> dict[str, Any]:
    """Whether the mass outside moves one way with beta, within every loss."""
    holds, details = True, []
    for loss in losses:
        ours = sorted((c for c in cells if c["loss"] == loss), key=lambda cell: cell["beta"])
        masses = [cell["end"]["outside"] for cell in ours]
        steps = [b - a if rising else a - b for a, b in itertools.pairwise(masses)]
        holds = holds and all(step >= -_TOLERANCE for step in steps)
        details.append(f"{loss}: " + ", ".join(f"{mass:.2f}" for mass in masses))
    word = "grows" if rising else "does not grow"
    claim = f"pair {cells[0]['pair']}: the mass outside {word} with beta ({', '.join(losses)})"
    return {"name": name, "claim": claim, "holds": holds, "detail": "; ".join(details)}


def _ipo_least(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """IPO at its largest beta leaves the least mass outside."""
    ipo = [cell for cell in cells if cell["loss"] == "ipo"]
    if not ipo or len(_losses(cells)) < 2:
        return []
    strongest = max(ipo, key=lambda cell: cell["beta"])
    least = min(cells, key=lambda cell: cell["end"]["outside"])
    return [
        {
            "name": "ipo_least",
            "claim": f"ipo at beta {strongest['beta']:g} leaves the least mass outside",
            "holds": least is strongest,
            "detail": f"least: {_name(least)}, {least['end']['outside']:.2f}",
        }
    ]


def _ipo_targets(table: Sequence[Cell]) -> list[dict[str, Any]]:
    """IPO stops at the margin 1 / (2 beta), where 160 steps get that far (beta of 0.1 or more)."""
    ipo = [cell for cell in table if cell["loss"] == "ipo" and cell["beta"] >= 0.1]
    if not ipo:
        return []
    return [
        _all_cells(
            "ipo_target",
            "ipo stops at the margin 1 / (2 beta), within 2 %",
            ipo,
            lambda cell: abs(2 * cell["beta"] * cell["end"]["margin"] - 1) < 0.02,
            lambda cell: (
                f"{cell['pair']} {cell['end']['margin']:.3f} of {1 / (2 * cell['beta']):.3f}"
            ),
        )
    ]
