"""docs/study.md says what the committed rows of the full study say."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastdaa.study.claims import judge_claims
from fastdaa.study.curves import curve, hump, series_name, split, sweeps
from fastdaa.study.figures.correlations import clouds
from fastdaa.study.fit import fit_table
from fastdaa.study.json_file import write_json
from fastdaa.study.online_words import sentences, settings_of
from fastdaa.study.results import read_results
from fastdaa.study.table import read_table

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's folder as docs/study.md makes it from the committed files."""
    made = tmp_path_factory.mktemp("study")
    for name in ("points.jsonl", "tree.json"):
        with gzip.open(DOCS / "results" / f"study_{name}.gz") as file:
            (made / name).write_bytes(file.read())
    (made / "study.json").write_bytes((DOCS / "results" / "study.json").read_bytes())
    write_json(made / "fits.json", fit_table(read_table(made)))
    return made


def test_verdicts_and_numbers_of_the_page(folder: Path) -> None:
    results = read_results([folder])
    found = {claim.name: claim for claim in judge_claims(results)}
    counts = Counter(claim.verdict for claim in found.values())
    kinds = [counts[kind] for kind in ("reproduced", "partly", "not reproduced")]
    assert f"Of the {len(found)} claims" in PAGE and sum(kinds) == len(found)
    assert f"{kinds[0]} are reproduced, {kinds[1]} partly and {kinds[2]} not" in PAGE
    assert "beyond what three seeds can bear only DPO and SLiC" in " ".join(PAGE.split())
    clear = [
        f"{preset} {name}"
        for preset, rows in sweeps(results.rows).items()
        for name, group in split(rows, series_name).items()
        if (shape := hump(curve(group))) is not None and shape.interior
    ]
    assert clear == ["H DPO", "H SLiC"]


def test_correlations_of_the_page(folder: Path) -> None:
    seen = [
        cloud for rows in sweeps(read_results([folder]).rows).values() for cloud in clouds(rows)
    ]
    sizes = sorted(abs(cloud.r or 0.0) for cloud in seen)
    assert f"(|r| from {sizes[0]:.2f} to {sizes[-1]:.2f}," in " ".join(PAGE.split())
    clear = Counter(
        cloud.metric for cloud in seen if cloud.interval and math.prod(cloud.interval) > 0
    )
    told = f"the loss in {clear['loss_value']} of 6 cases, for accuracy in {clear['accuracy']})"
    assert told in " ".join(PAGE.split())


def test_predictions_of_the_farthest_third(folder: Path) -> None:
    words = " ".join(PAGE.split())
    groups = [
        {fit["law"]: fit["far_rmse"] for fit in group["fits"] if not fit["intercept"]}
        for group in read_results([folder]).fits["groups"]
        if group["group"]["size"] == "d32" and group["group"]["loss"] != "rdpo"
    ]
    better = {law: sum(group["log"] < group[law] for group in groups) for law in ("d", "kl")}
    middle = [statistics.median(group[law] for group in groups) for law in ("log", "kl")]
    assert f"{better['kl']} of {len(groups)}, with median errors of {middle[0]:.2f}" in words
    assert f"and {middle[1]:.1f})" in words
    assert f"{len(groups) - better['d']} of {len(groups)} where the farthest third" in words


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
    told = " ".join(sentences(rows))
    assert "of 8 distances: APA at 0, PPO at 0" in told
    assert "of 8 distances: APA at 2, AWR at 0" in told
    words = " ".join(page.split())
    assert "at none of 8 distances is either ahead" in words and "at 2 of 8 distances" in words
    found = settings_of(rows)
    shares = [
        f"{setting.moved / setting.mean('kl'):.0%} of its end ({setting.moved:.2f} nats)"
        for setting in (found["apa"][0], found["ppo"][1])
    ]
    assert shares == ["14% of its end (0.65 nats)", "16% of its end (0.68 nats)"]
    assert "rises by 14 % of its end (0.65 nats)" in words and "by 16 % (0.68 nats)" in words
    beyond = [
        mean(ends["apa", False, strength], "gold")
        - statistics.fmean(
            row["gold"] for row in rows
            if (row["series"], row["beta"]) == ("apa_fixed_point", strength)
        )
        for strength in (0.05, 0.1)
    ]  # fmt: skip
    assert f"it has {beyond[0]:.2f} and {beyond[1]:.2f} more than they" in words
