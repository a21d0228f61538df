"""What a study left in its folder, read for the report; every part may be missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdaa.study.fit import fit_table
from fastdaa.study.presets import GLIMPSE
from fastdaa.study.table import Table, read_table


@dataclass(frozen=True)
class Results:
    """The parts of a study. A part that was not run is empty."""

    rows: Table = field(default_factory=lambda: Table([]))
    fits: Mapping[str, Any] = field(default_factory=dict)
    tree: Mapping[str, Any] = field(default_factory=dict)
    correlations: Mapping[str, Any] = field(default_factory=dict)
    tilt: tuple[Mapping[str, Any], ...] = ()
    estimators: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_world(self) -> bool:
        """Whether scores are gold rewards of the synthetic world."""
        return any(row.get("gold") is not None for row in self.rows)

    @property
    def is_glimpse(self) -> bool:
        """Whether there are runs of ``--fast``, whose numbers mean nothing."""
        return self.in_world and any(row.get("preset") == GLIMPSE for row in self.rows)

    @property
    def is_study(self) -> bool:
        """Whether the small world or the tree was run, so that the papers' claims are at stake."""
        return self.in_world or bool(self.tree)

    @property
    def score_label(self) -> str:
        """The axis label of ``score``."""
        if self.in_world:
            return "gold reward\n(reference std. deviations)"
        return "score (unit of the table)"


def read_results(source: Path) -> Results:
    """Reads a study's folder, or one table of rows.

    Args:
        source: a folder with any of ``points.jsonl``, ``fits.json``, ``tree.json``,
            ``correlations.json``, ``tilt.jsonl``, ``estimators.json`` and ``study.json``; or a
            ``.jsonl`` or ``.csv`` table, see :mod:`fastdaa.study.columns`, to which laws are fitted
            here.

    Raises:
        FileNotFoundError: no such folder, or nothing of a study in it.
        ValueError: a file that cannot be read, named with its line where there is one.
    """
    if source.is_file():
        rows = read_table(source)
        return Results(rows=rows, fits=fit_table(rows))
    if not source.is_dir():
        raise FileNotFoundError(f"report: expected a study's folder or a table, got {source}")
    points = source / "points.jsonl"
    results = Results(
        rows=read_table(points) if points.is_file() else Table([]),
        fits=_read_object(source / "fits.json"),
        tree=_read_object(source / "tree.json"),
        correlations=_read_object(source / "correlations.json"),
        tilt=tuple(_read_lines(source / "tilt.jsonl")),
        estimators=_read_object(source / "estimators.json"),
        settings=_read_object(source / "study.json"),
    )
    parts = (results.rows, results.fits, results.tree, results.tilt, results.estimators)
    if not any(map(len, parts)):
        raise FileNotFoundError(
            f"report: expected points.jsonl, fits.json, tree.json, tilt.jsonl or estimators.json "
            f"in {source}, got none of them (name a table file to report on it alone)"
        )
    return results


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, got {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows
