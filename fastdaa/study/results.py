"""What a study left in its folder, read for the report; every part may be missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdaa.study.correlate import correlate_table
from fastdaa.study.fit import fit_table
from fastdaa.study.presets import GLIMPSE
from fastdaa.study.table import Table, read_table
from fastdaa.study.table_files import json_rows


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
    renewed: tuple[str, ...] = ()
    """Files that were of other rows than these: what they hold was computed anew."""

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


def _correlations(rows: Table) -> Mapping[str, Any]:
    try:
        return correlate_table(rows)
    except ValueError:  # nothing to hold against the score, which the page says
        return {}


_OF_ROWS: dict[str, Callable[[Table], Mapping[str, Any]]] = {
    "fits.json": fit_table,
    "correlations.json": _correlations,
}
_OF_A_STUDY = ("points.jsonl", "tree.json", "tilt.jsonl", "estimators.json")
_OF_A_RUN = ("track.jsonl", "metrics.jsonl")


def is_study_folder(path: Path) -> bool:
    """Whether a folder is a study's: output folders of runs may hold fits of theirs, too."""
    if any((path / name).is_file() for name in _OF_A_STUDY):
        return True
    return (path / "fits.json").is_file() and not any((path / n).is_file() for n in _OF_A_RUN)


def read_results(sources: Sequence[Path]) -> Results:
    """Reads a study's folder, or tables of rows.

    Args:
        sources: one folder with any of ``points.jsonl``, ``fits.json``, ``tree.json``,
            ``correlations.json``, ``tilt.jsonl``, ``estimators.json``; or tables, files and folders
            as :func:`fastdaa.study.table_files.rows_of` takes them, to which laws are fitted here.

    Fits and correlations of other rows than those of ``points.jsonl`` (of a part of them, of an
    earlier sweep, of another score) are computed anew with default settings.

    Raises:
        FileNotFoundError: no such folder or file, or nothing of a study in it.
        ValueError: a file that cannot be read, named with its line where there is one.
    """
    first = sources[0]
    if len(sources) > 1 or not is_study_folder(first):
        return _read_tables(sources)
    points, tilt = first / "points.jsonl", first / "tilt.jsonl"
    rows = read_table(points) if points.is_file() else Table([])
    renewed = [name for name in _OF_ROWS if _is_of_others(first / name, rows)]
    fits, correlations = (
        compute(rows) if name in renewed else _read_object(first / name)
        for name, compute in _OF_ROWS.items()
    )
    results = Results(
        rows=rows,
        fits=fits,
        tree=_read_object(first / "tree.json"),
        correlations=correlations,
        tilt=tuple(row for _, row in json_rows(tilt)) if tilt.is_file() else (),
        estimators=_read_object(first / "estimators.json"),
        settings=_read_object(first / "study.json"),
        renewed=tuple(renewed),
    )
    parts = (results.rows, results.fits, results.tree, results.tilt, results.estimators)
    if not any(map(len, parts)):
        raise FileNotFoundError(_nothing_in(first))
    return results


def _is_of_others(file: Path, rows: Table) -> bool:
    digest = _read_object(file).get("digest")
    return digest is not None and bool(len(rows)) and digest != rows.digest()


def _read_tables(sources: Sequence[Path]) -> Results:
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"report: expected a study's folder or a table, got {source}")
    try:
        rows = read_table(sources)
    except FileNotFoundError as error:
        if len(sources) > 1:
            raise
        raise FileNotFoundError(_nothing_in(sources[0])) from error
    return Results(rows=rows, fits=fit_table(rows))


def _nothing_in(folder: Path) -> str:
    return (
        "report: expected points.jsonl, fits.json, tree.json, tilt.jsonl or estimators.json of a "
        f"study, track.jsonl, or a run of `fastdaa online` with held-out prompts in {folder}, got "
        "none of them (name a table file to report on it alone)"
    )


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
