"""Whose completion a prompt is given where that is fixed for the run."""

from __future__ import annotations

import collections

import pytest
from datasets import Dataset

from fastdaa.data.mismatched import crossed_pairs, partners
from fastdaa.data.unpaired_collate import UnpairedCollator


def rows(count, each=1):
    """``each`` completions of every prompt, one after another."""
    return [
        {"prompt_ids": [i // each, 7], "completion_ids": [i, 5], "label": i % 2 > 0}
        for i in range(count)
    ]


def given(data):
    """By prompt and completion, the completion that is given."""
    found = partners(Dataset.from_list(data))
    return {str(row): data[place]["completion_ids"] for row, place in zip(data, found, strict=True)}


@pytest.mark.parametrize("each", [1, 2, 5])
def test_another_prompts(each):
    data = rows(60, each)
    found = partners(Dataset.from_list(data))
    assert all(place // each != partner // each for place, partner in enumerate(found))
    # Those of each prompt are spread, and few completions serve often.
    assert collections.Counter(found.tolist()).most_common()[0][1] <= 1 + each
    assert len({partner - place for place, partner in enumerate(found)}) > 30


def test_half_of_the_rows_have_one_prompt():
    data = [{**row, "prompt_ids": [0]} if place % 2 else row for place, row in enumerate(rows(40))]
    for place, partner in enumerate(partners(Dataset.from_list(data))):
        assert data[place]["prompt_ids"] != data[partner]["prompt_ids"]


def test_where_all_prompts_are_the_same():
    found = partners(Dataset.from_list([{**row, "prompt_ids": [1]} for row in rows(9)]))
    assert sorted(found) == list(range(9)) and all(i != place for i, place in enumerate(found))


def test_equal_rows():
    data = [*rows(3), *rows(3)]
    for place, partner in enumerate(partners(Dataset.from_list(data))):
        assert place % 3 != partner % 3


def test_the_order_of_the_rows_is_no_matter():
    data = rows(30, 2)
    assert given(data) == given(data[::-1]) == given(data[7:] + data[:7])


def test_most_stay_where_rows_are_added():
    before, after = given(rows(100)), given(rows(110))
    assert 80 < sum(before[row] == after[row] for row in before) < 100


def test_labels_are_no_matter():
    data = rows(9)
    other = [{**row, "label": not row["label"]} for row in data]
    assert [*partners(Dataset.from_list(data))] == [*partners(Dataset.from_list(other))]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("keep_start", ([1, 2], [8])), ("keep_end", ([2], [8, 9]))],
)
def test_crossed_pairs(mode, expected):
    collate = UnpairedCollator("packed", mismatched=True, max_length=3, truncation_mode=mode)
    data = Dataset.from_list(
        [
            {"prompt_ids": [1, 2], "completion_ids": [3], "label": True},
            {"prompt_ids": [4], "completion_ids": [8, 9], "label": False},
        ]
    )
    pairs = crossed_pairs(data, collate.cross)
    assert [tuple(pairs[0].values()), tuple(pairs[1].values())] == [
        (*expected, []), ([4], [3], [])
    ]  # fmt: skip
    fixed = data.add_column("mismatched_ids", [[5], [6]])
    assert crossed_pairs(fixed, collate.cross)["chosen_ids"][:] == [[5], [6]]


def test_the_collator_takes_them():
    data = [
        {**row, "row_id": i, "mismatched_ids": [20 + i], "ref_mismatched_logps": 0.5 + i}
        for i, row in enumerate(rows(3))
    ]
    batch = UnpairedCollator("padded", 0, mismatched=True)(
        [{**row, "ref_logps": 9.0} for row in data]
    )
    (pack,), (crossed,) = batch["packs"], batch["kl_packs"]
    assert crossed["input_ids"].tolist() == [[0, 7, 20], [1, 7, 21], [2, 7, 22]]
    assert (
        crossed["ref_logps"].tolist() == [0.5, 1.5, 2.5] and pack["ref_logps"].tolist() == [9.0] * 3
    )
    assert UnpairedCollator("padded", 0, mismatched=True)(data[:1])["mismatched"] == 1
