"""The small problems with exact answers, in one go: null space, tree, oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdaa.study.null_space import null_space
from fastdaa.study.oracles import run_oracles
from fastdaa.study.tree import TreeSettings, run_tree


def run_exact(
    settings: TreeSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """The content of ``tree.json``, whose shape :mod:`fastdaa.study.tree` describes.

    Args:
        settings, progress, workers: of :func:`fastdaa.study.tree.run_tree`.
    """
    bandit, oracles = null_space(), run_oracles()
    return {"null_space": bandit, "oracles": oracles} | run_tree(settings, progress, workers)


def failures(content: dict[str, Any]) -> list[str]:
    """Claims that do not hold in the content of ``tree.json``."""
    bandit = content["null_space"]
    wrong = [
        f"{record['claim']} (expected {record['expected']:.6g}, got {record['got']:.6g})"
        for record in content["oracles"]
        if not record["holds"]
    ]
    if not bandit["equal"]:
        wrong.append("the policies with equal log-ratios in the data have the same loss")
    if not bandit["higher"]:
        wrong.append("a policy that prefers one of the two contradicting answers has a larger loss")
    return wrong + [
        f"{check['claim']} ({check['detail']})" for check in content["checks"] if not check["holds"]
    ]
