"""Scored completions become pairs with advantages, and advantages reach the collator."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from datasets import Dataset
from word_files import word_tokenizer

from fastdaa.data import DataError, PairCollator, load_pairs, tokenize_pairs
from fastdaa.data.rows import PairRows


def row(prompt: str, completion: str, score: object, **more: object) -> dict:
    return {"prompt": prompt, "completion": completion, "score": score, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_best_with_worst_and_advantages_about_the_mean_of_the_prompt(tmp_path, caplog):
    rows = [
        row("a", "x1", 1.0), row("b", "y1", 2), row("a", "x4", 4.0), row("a", "x2", 2.0),
        row("b", "y2", 5), row("a", "x9", 9.0), row("c", "alone", 3), row("b", "y3", 3),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs(write(tmp_path / "scored.jsonl", rows))
    found = {
        (r["prompt"], r["chosen"], r["rejected"]): (r["chosen_advantage"], r["rejected_advantage"])
        for r in pairs
    }
    # Means: a 4, b 10/3. The middle one of b and the only one of c are left out.
    assert found == {
        ("a", "x9", "x1"): (5.0, -3.0),
        ("a", "x4", "x2"): (0.0, -2.0),
        ("b", "y2", "y1"): pytest.approx((5 / 3, -4 / 3)),
    }
    assert "2 of 8 scored completions left out" in caplog.text


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("a", "x", "high"), "field 'score': expected a finite number, got 'high'"),
        (row("a", "x", float("nan")), "field 'score': expected a finite number"),
        (row("a", "x", None), "field 'score': expected a value as in the first row, got none"),
        ({"prompt": "a", "score": 1.0}, "field 'completion': expected a value"),
    ],
    ids=["text", "nan", "none", "no completion"],
)
def test_a_bad_record_is_named(tmp_path, bad, message):
    rows = [row("a", "x1", 1.0), row("a", "x2", 2.0), bad]
    path = write(tmp_path / "scored.jsonl", rows)
    with pytest.raises(DataError) as error:
        load_pairs(path)
    assert message in str(error.value) and ":3" in str(error.value)
    assert len(load_pairs(path, on_bad_row="skip")) == 1


def test_one_completion_a_prompt_is_not_enough(tmp_path):
    path = write(tmp_path / "scored.jsonl", [row("a", "x", 1.0), row("b", "y", 2.0)])
    with pytest.raises(DataError, match="expected at least one pair"):
        load_pairs(path)


def test_pairs_with_a_score_of_their_own_stay_pairs():
    dataset = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b", "score": 1.0}])
    (pair,) = load_pairs(dataset)
    assert (pair["chosen"], pair["rejected"]) == ("a", "b")
    assert "chosen_advantage" not in pair


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
def test_advantages_of_a_pack_follow_its_pairs(layout):
    rows = [
        {
            "prompt_ids": [1, 2], "chosen_ids": [3] * (n + 1), "rejected_ids": [4, 5],
            "chosen_advantage": float(n), "rejected_advantage": -float(n),
        }
        for n in range(4)
    ]  # fmt: skip
    read = PairRows(Dataset.from_list(rows)).__getitems__([2, 0, 3])
    batch = PairCollator(layout, pad_token_id=0, tokens_per_pack=9)(read)
    assert len(batch["packs"]) > 1
    for pack in batch["packs"]:
        members = [int(batch["row_ids"][i]) for i in pack["pair_index"]]
        want = [sign * float(n) for n in members for sign in (1, -1)]
        assert torch.equal(pack["advantages"], torch.tensor(want))


def test_advantages_in_some_rows_only_are_an_error():
    rows = [
        {"row_id": 0, "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3],
         "chosen_advantage": 1.0, "rejected_advantage": 0.0},
        {"row_id": 1, "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="in all rows or in none"):
        PairCollator("packed")(rows)


def test_advantages_of_some_pairs_only_are_an_error():
    texts = [{"prompt": "p", "chosen": side, "rejected": "c"} for side in "ab"]
    advantages = dict.fromkeys(("chosen_advantage", "rejected_advantage"), 1.0)
    dataset = Dataset.from_list([{**texts[0], **advantages}, texts[1]])
    with pytest.raises(DataError, match="in all rows or in none, got them in 1 of 2"):
        tokenize_pairs(dataset, word_tokenizer())
