"""Runs of ``fastdaa online`` as rows of a table, from what they have logged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdaa.online.config import CONFIG_FILE
from fastdaa.study.columns import Row
from fastdaa.study.table_files import json_rows
from fastdaa.train import checkpoints
from fastdaa.train.metrics_writer import METRICS_FILE

WHITENED = ("masked", "unmasked")
"""Values of ``whiten_advantages`` that whiten what APA and AWR would leave as it is."""


def holds_online_run(folder: Path) -> bool:
    """Whether ``fastdaa online`` has left measurements on held-out prompts there."""
    file = folder / METRICS_FILE
    return file.is_file() and any("eval/kl" in row for _, row in json_rows(file))


def online_rows(folder: Path) -> Iterator[tuple[str, Row]]:
    """The reference at KL 0, then each measurement; the score is the gold reward, if there is one.

    ``beta`` is lambda of APA and AWR, the KL coefficient of PPO; ``reward`` what was trained on;
    ``whitened`` whether APA or AWR had whitened advantages.
    """
    found = checkpoints.complete(folder)
    config: dict[str, Any] = {}
    if found and (found[-1][1] / CONFIG_FILE).is_file():
        config = json.loads((found[-1][1] / CONFIG_FILE).read_text(encoding="utf-8"))
    algorithm = config.get("algorithm")
    labels = {
        "run": str(folder),
        "algorithm": algorithm,
        # By default those of PPO are, and no others.
        "whitened": algorithm != "ppo" and config.get("whiten_advantages") in WHITENED,
        "beta": config.get("kl_coef" if algorithm == "ppo" else "kl_lambda"),
        "seed": config.get("seed"),
        "lr": config.get("learning_rate"),
    }
    measured = [(where, row) for where, row in json_rows(folder / METRICS_FILE) if "eval/kl" in row]
    gold = "gold" if all(row.get("eval/gold") is not None for _, row in measured) else "scores"
    where, first = measured[0]
    start = {"score": first[f"eval/ref_{gold}"], "reward": first["eval/ref_scores"]}
    yield where, labels | start | {"checkpoint": 0, "kl": 0.0, "fraction": 0.0}
    for where, row in measured:
        yield where, labels | _measured(row, gold, config.get("iterations"))


def _measured(row: Row, gold: str, iterations: int | None) -> Row:
    return {
        "checkpoint": row["step"],
        "kl": row["eval/kl"],
        "kl_k1": row["eval/kl"],
        "kl_k1_stderr": row.get("eval/kl_stderr"),
        "score": row[f"eval/{gold}"],
        "score_stderr": row.get(f"eval/{gold}_stderr"),
        "reward": row["eval/scores"],
        "length": row.get("eval/length"),
        "finished": row.get("eval/finished"),
        "fraction": None if iterations is None else row["iteration"] / iterations,
    }
