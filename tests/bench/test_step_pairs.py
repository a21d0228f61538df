"""Pairs of the step benchmark: stated lengths, two orders of the same pairs, real text."""

from __future__ import annotations

import dataclasses
import gzip
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from fastdaa.benchmarks.step import cases, contenders, pairs
from fastdaa.benchmarks.step.cases import CASES, MODELS, WORKLOADS, Case, Lengths, from_file
from fastdaa.benchmarks.step.pairs import PairLengths
from fastdaa.data import DataError

SMOKE = cases.SELECTIONS["tiny"][0]


@pytest.mark.parametrize("name", WORKLOADS)
def test_generated_pairs_keep_their_bounds(name: str) -> None:
    workload = WORKLOADS[name]
    rows = pairs.generated(workload, 40, vocab=199, seed=0)
    assert len(rows) == 40
    for row in rows:
        prompt, chosen, rejected = (row[field] for field in pairs.FIELDS)
        assert min(map(len, (prompt, chosen, rejected))) >= 1
        assert len(prompt) + max(len(chosen), len(rejected)) <= workload.max_length
        assert all(len(pairs.SPECIAL) <= token < 199 for token in (*prompt, *chosen, *rejected))


def test_lengths_have_the_stated_median_and_spread() -> None:
    """Of exp(N(log 100, 0.5^2)): median 100, and 84.13 % lie below 100 e^0.5 = 164.9."""
    workload = dataclasses.replace(
        WORKLOADS["smoke"],
        prompt=Lengths(100, 0.5, 1, 10_000),
        completion=Lengths(5, 0.1, 1, 10),
        max_length=20_000,
    )
    sizes = [len(row["prompt_ids"]) for row in pairs.generated(workload, 1500, 199, seed=1)]
    assert statistics.median(sizes) == pytest.approx(100, rel=0.06)
    assert sum(size < 164.9 for size in sizes) / 1500 == pytest.approx(0.8413, abs=0.03)


def test_a_model_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    """Its embedding would be read beyond its end: on CUDA that takes the device along."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    case = dataclasses.replace(from_file(str(data), "cpu"), model=MODELS["llama-smoke"])
    with pytest.raises(ValueError, match="at least 260 for text, got one of 199"):
        pairs.prepare(case, str(tmp_path), seed=0)


def test_pairs_follow_from_the_seed() -> None:
    first, same, other = (pairs.generated(WORKLOADS["smoke"], 5, 199, seed) for seed in (0, 0, 1))
    assert first == same != other


def test_sorted_order_holds_the_same_pairs_behind_the_same_warmup() -> None:
    lengths = [PairLengths(size, 1, 1) for size in (9, 2, 30, 5, 40, 3, 31, 4)]
    order = pairs.sorted_order(lengths, batch=2, warmup=1)
    assert order[:2] == [0, 1]
    assert sorted(order) == list(range(8))
    batches = {frozenset(order[i : i + 2]) for i in (2, 4, 6)}
    assert batches == {frozenset({5, 7}), frozenset({3, 2}), frozenset({6, 4})}


def test_statistics_by_hand() -> None:
    """Stored 10 + 6 tokens, prompts once more: 22; a padded batch has 4 rows of 4 + 3 = 7."""
    stats = pairs.describe([PairLengths(2, 3, 5), PairLengths(4, 1, 1)], batch=2)
    assert stats["prompt_tokens"] == {"median": 2, "p90": 4}
    assert stats["completion_tokens"] == {"median": 1, "p90": 5}
    assert stats["padding_share"] == round(1 - 22 / 28, 4)
    assert stats["repeated_prompt_share"] == round(6 / 22, 4)
    assert "2 pairs" in pairs.in_words(stats)


def test_both_orders_are_written_for_the_trainers(tmp_path: Path) -> None:
    found = pairs.prepare(SMOKE, str(tmp_path), seed=0)
    for order, lengths in found.items():
        rows = load_from_disk(str(tmp_path / order)).to_list()
        assert [PairLengths(*(len(row[f]) for f in pairs.FIELDS)) for row in rows] == lengths
    assert sorted(found["given"]) == sorted(found["sorted"])
    assert len(found["given"]) == SMOKE.batch * (SMOKE.steps + SMOKE.warmup)


def _case_of(path: Path) -> Case:
    case = cases.from_file(str(path), "cpu")
    return cases.resized(case, batch=2, steps=2, warmup=1, model="llama-smoke")


def _pair(number: int) -> dict[str, Any]:
    return {"prompt": f"What is {number}?", "chosen": "A number.", "rejected": f"{number} " * 9}


@pytest.mark.parametrize("packed", [False, True], ids=["jsonl", "jsonl.gz"])
def test_real_text_from_a_file(tmp_path: Path, packed: bool) -> None:
    text = "".join(json.dumps(_pair(number)) + "\n" for number in range(4))
    path = tmp_path / ("pairs.jsonl.gz" if packed else "pairs.jsonl")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    case = dataclasses.replace(
        _case_of(path), model=dataclasses.replace(MODELS["llama-smoke"], vocab=400)
    )
    lengths = pairs.prepare(case, str(tmp_path / "out"), seed=0)["given"]
    assert len(lengths) == 6
    assert lengths[:2] == lengths[4:], "four pairs are used again from the first"
    assert "pairs.jsonl" in case.workload.distribution


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "chosen": "b"', r"pairs\.jsonl:2: expected"),
        ('{"prompt": "a", "chosen": "b"}', r"pairs\.jsonl:2: field 'rejected': expected"),
    ],
    ids=["half a line", "no rejected"],
)
def test_a_broken_data_file_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(_pair(1)) + f"\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        pairs.prepare(_case_of(path), str(tmp_path / "out"), seed=0)


def test_names_of_cases_are_unique_and_selections_are_known() -> None:
    for name, chosen in cases.SELECTIONS.items():
        assert len({case.id for case in chosen}) == len(chosen), name
        assert all(CASES[case.id] is case for case in chosen), name
    assert cases.choose(None, "full", "cpu") != cases.choose(None, "full", "cuda")
    with pytest.raises(ValueError, match="did you mean 'short-chat/llama-13m/full'"):
        cases.choose(["short-chat/llama-13/full"], None, "cpu")


def test_a_part_of_an_id_names_the_cases_of_the_device() -> None:
    def ids(*names: str, device: str = "cpu") -> list[str]:
        return [case.id for case in cases.choose(list(names), None, device)]

    assert ids("smoke") == ["smoke/llama-smoke/full"]
    # An id is that case alone, also where others begin with it.
    assert ids("short-chat/llama-13m/full") == ["short-chat/llama-13m/full"]
    parts = ids("short-chat", "short-chat/llama-13m/full")
    assert len(parts) > 2 and len(set(parts)) == len(parts)
    assert all("13m" in one for one in ids("lora")) and "13m" not in "".join(
        ids("lora", device="cuda")
    )
    with pytest.raises(ValueError, match=r"expected \(a part of\) the id of a case, got '1.2b'"):
        ids("1.2b")


def test_a_family_stands_for_its_contenders() -> None:
    names = [contender.name for contender in contenders.choose(["fastdaa", "trl"])]
    assert names[0] == "trl" and {"fastdaa-padded", "fastdaa-prefix_shared"} < {*names}
    with pytest.raises(ValueError, match="got 'fastda'; did you mean"):
        contenders.choose(["fastda"])
