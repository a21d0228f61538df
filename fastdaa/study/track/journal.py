"""The files of a tracked run, which grow line by line and survive interruptions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdaa.study.table import append_rows
from fastdaa.study.track.decline import Measured
from fastdaa.study.track.scoring import Sample, Scores
from fastdaa.train.json_lines import json_lines, put_aside, replace_text
from fastdaa.whole_file import naming

TABLE = "track.jsonl"
"""Name of the table in the output folder of a run."""


class Journal:
    """Rows and samples of tracked runs.

    - ``table``: the table that ``fastdaa study fit`` and ``report`` read; every row has a score.
    - ``<table>_unscored``: rows in the same form whose score or KL is unknown (null), because
      nothing scores or a scorer failed.
    - ``<table>_samples``: one line a sample, with the columns ``run`` and ``checkpoint``.

    Args:
        table: path of a ``.jsonl`` file; the other two lie beside it.
    """

    def __init__(self, table: str | Path):
        self.table = Path(table)
        if self.table.suffix != ".jsonl":
            raise ValueError(f"table: expected a path that ends with .jsonl, got {table}")
        self.unscored = self.table.with_name(self.table.stem + "_unscored.jsonl")
        self.samples = self.table.with_name(self.table.stem + "_samples.jsonl")

    def put_aside(self) -> None:
        """Keep the files of an earlier run under a number: ``track.1.jsonl`` and so on."""
        put_aside([self.table, self.unscored, self.samples])

    def forget_after(self, run: str, step: float) -> None:
        """Remove what a run has left behind ``step``, and samples without a row."""
        kept = set()
        for file in (self.table, self.unscored):
            rows = [row for row in _read(file) if row.get("run") != run or _step(row) <= step]
            kept |= {(row.get("run"), row.get("checkpoint")) for row in rows}
            _rewrite(file, rows)
        samples = [s for s in _read(self.samples) if (s.get("run"), s.get("checkpoint")) in kept]
        _rewrite(self.samples, samples)

    def rows(self, run: str) -> list[dict[str, Any]]:
        """All rows of a run, by checkpoint."""
        rows = [row for file in (self.table, self.unscored) for row in _read(file)]
        return sorted((row for row in rows if row.get("run") == run), key=_step)

    def history(self, run: str) -> list[Measured]:
        """The scored measurements of a run, from its samples."""
        known: dict[int, list[dict[str, Any]]] = {}
        for sample in _read(self.samples):
            if sample.get("run") == run:
                known.setdefault(_step(sample), []).append(sample)
        history = []
        for step, samples in sorted(known.items()):
            samples.sort(key=lambda sample: sample["prompt_index"])
            if all(s.get("score") is not None and s.get("kl_rb") is not None for s in samples):
                scores = [sample["score"] for sample in samples]
                history.append(Measured(step, scores, [sample["kl_rb"] for sample in samples]))
        return history

    def check_settings(self, run: str, settings: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` where earlier rows of the run were measured in another way."""
        for row in self.rows(run):
            for name, value in settings.items():
                if row.get(name) != value:
                    raise ValueError(
                        f"track: expected {name} = {row.get(name)!r}, with which checkpoint "
                        f"{row['checkpoint']} of {run!r} in {self.table} was measured, got "
                        f"{value!r}; its rows would not compare"
                    )

    def append(
        self,
        row: Mapping[str, Any],
        samples: Sequence[Sample],
        scores: Mapping[str, Scores],
        values: Sequence[float] | None,
    ) -> None:
        """Write a measurement, its row last: it counts once the row is there."""
        place = {"run": row["run"], "checkpoint": row["checkpoint"]}
        lines = []
        for number, sample in enumerate(samples):
            lines.append({
                **place,
                "prompt_index": sample.prompt.number,
                "prompt": sample.prompt.text,
                "answer": sample.answer,
                "reference": sample.prompt.reference,
                "tokens": sample.tokens,
                "finished": sample.finished,
                "score": None if values is None else values[number],
                **{column: said.values[number] for column, said in scores.items()},
                "kl_k1": _finite(sample.k1),
                "kl_rb": _finite(sample.rb),
                "entropy": _finite(sample.entropy),
            })  # fmt: skip
        _append(self.samples, lines)
        if row.get("score") is None or row.get("kl") is None:
            _append(self.unscored, [dict(row)])
        else:
            append_rows(self.table, [dict(row)])


def _step(row: Mapping[str, Any]) -> int:
    step = row.get("checkpoint", 0)
    return step if isinstance(step, int) else 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read(file: Path) -> list[dict[str, Any]]:
    return [row for _, row in json_lines(file)]


def _rewrite(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if file.is_file():
        replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def _append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with naming(file), file.open("a", encoding="utf-8") as lines:
        lines.write(text)
