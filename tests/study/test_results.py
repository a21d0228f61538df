"""docs/study.md says what the committed rows of the full study say."""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "study.md").read_text(encoding="utf-8")
BETAS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


@pytest.fixture(scope="module")
def finals() -> list[dict[str, Any]]:
    with gzip.open(DOCS / "results" / "study_points.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if row["final"] and row["size"] == "d32"]


def cell(finals: list[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    found = [row for row in finals if all(row[name] == value for name, value in key.items())]
    assert len(found) == 3, key
    return found


def mean(rows: list[dict[str, Any]], column: str) -> float:
    return statistics.fmean(row[column] for row in rows)


@pytest.mark.parametrize("preset", ["H", "M"])
def test_the_table_is_that_of_the_rows(finals: list[dict[str, Any]], preset: str) -> None:
    for beta in BETAS:
        values = []
        for loss in ("dpo", "slic", "ipo"):
            rows = cell(finals, preset=preset, loss=loss, beta=beta)
            distance = statistics.fmean(row["kl"] ** 0.5 for row in rows)
            values.append(f"{distance:.2f}, {mean(rows, 'gold'):+.2f}")
        assert f"| {beta:g} | {' | '.join(values)} |" in PAGE


def test_the_hump_and_the_order_that_the_page_claims(finals: list[dict[str, Any]]) -> None:
    gold = {
        loss: [mean(cell(finals, preset="H", loss=loss, beta=b), "gold") for b in BETAS]
        for loss in ("dpo", "slic", "ipo")
    }
    for values in gold.values():
        assert max(values) not in (values[0], values[-1])
        assert max(values) - values[0] > 0.4
    for preset in ("H", "M"):
        for beta in BETAS:
            kl = {
                loss: mean(cell(finals, preset=preset, loss=loss, beta=beta), "kl")
                for loss in ("dpo", "slic", "ipo")
            }
            assert kl["ipo"] < min(kl["dpo"], kl["slic"])


def test_seconds_versions_and_estimators() -> None:
    study = json.loads((DOCS / "results" / "study.json").read_text())
    for name in (f"{study['seconds']:.0f} s", study["commit"], study["versions"]["torch"]):
        assert name in PAGE
    assert study["seconds"] < 1800
    content = json.loads((DOCS / "results" / "study_estimators.json").read_text())
    ratios = [f"{policy['variance_ratio']:.1f}" for policy in content["policies"]]
    assert f"{ratios[0]}, {ratios[1]} and {ratios[2]} times" in PAGE
    for policy in content["policies"]:
        for name in ("k1", "rb"):
            assert abs(policy["estimators"][name]["bias_in_stderr"]) < 1


def test_the_on_policy_table_is_that_of_the_rows() -> None:
    page = (DOCS / "online.md").read_text(encoding="utf-8")
    with gzip.open(DOCS / "results" / "online_points.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    ends: dict[tuple[str, bool, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["final"] and row["algorithm"] in ("apa", "ppo", "awr"):
            ends.setdefault((row["algorithm"], row["whitened"], row["beta"]), []).append(row)
    assert len(ends) == 16
    for (algorithm, whitened, strength), found in ends.items():
        assert len(found) == 3
        kind = "coefficient" if algorithm == "ppo" else "λ"
        name = f"{algorithm.upper()}{' whitened' if whitened else ''}, {kind}"
        numbers = f"{mean(found, 'kl'):.2f} | {mean(found, 'gold'):+.2f}"
        assert f"| {name} | {strength:g} | {numbers} |" in page
    # What the page says in words: the order in lambda, the drift, the collapse.
    kl = {key: mean(found, "kl") for key, found in ends.items()}
    apa = [kl["apa", False, strength] for strength in (0.05, 0.1, 0.2, 0.5, 1.0)]
    assert apa == sorted(apa, reverse=True)
    assert kl["ppo", False, 0.0] > 2 * kl["ppo", False, 0.05]
    assert mean(ends["ppo", False, 0.0], "gold") < 0 < mean(ends["ppo", False, 0.05], "gold")
