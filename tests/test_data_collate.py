"""Layouts: the same tokens are scored in all three, and every sequence sees itself and no other."""

from __future__ import annotations

import random

import pytest
import torch

from fastdaa.data import PairCollator, dense_mask, selection_from
from fastdaa.data.collate import SequenceCollator

LAYOUTS = ("prefix_shared", "packed", "padded")
PAD = 0


def make_row(prompt=(), chosen=(), rejected=(), row_id=0, **more):
    return {
        "row_id": row_id,
        "prompt_ids": list(prompt),
        "chosen_ids": list(chosen),
        "rejected_ids": list(rejected),
        **more,
    }


def random_rows(rng: random.Random, pairs: int, *, skips: bool = False) -> list[dict]:
    rows = []
    for row_id in range(pairs):
        sizes = [rng.choice([0, 1, 2, rng.randint(0, 9)]) for _ in range(3)]
        prompt, chosen, rejected = ([rng.randint(1, 99) for _ in range(size)] for size in sizes)
        row = make_row(prompt, chosen, rejected, row_id=row_id + 100)
        if skips and rng.random() < 0.5:
            side = rng.choice(["chosen_skip", "rejected_skip"])
            row.update(chosen_skip=0, rejected_skip=0)
            row[side] = rng.randint(0, len(prompt))
        rows.append(row)
    if not any(row["chosen_ids"] or row["rejected_ids"] or row["prompt_ids"] for row in rows):
        rows[0]["chosen_ids"] = [1]
    return rows


def sequences_of(row: dict) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of the chosen and the rejected sequence, written plainly."""
    prompt = row["prompt_ids"]
    return [
        (prompt[row.get("chosen_skip", 0) :], row["chosen_ids"]),
        (prompt[row.get("rejected_skip", 0) :], row["rejected_ids"]),
    ]


def visible_history(pack: dict, row: int) -> list[tuple[int, int]]:
    """(position, token) of everything that a position of the flattened row attends to."""
    ids, positions = pack["input_ids"], pack["position_ids"]
    length = ids.shape[1]
    if "segments" in pack:
        seen = dense_mask(pack["segments"], length)[0, 0, row].nonzero().flatten()
        found = [(int(positions[0, at]), int(ids[0, at])) for at in seen]
    else:
        line, column = divmod(row, length)
        assert pack["attention_mask"][line, : column + 1].all()
        found = [(int(positions[line, at]), int(ids[line, at])) for at in range(column + 1)]
    return sorted(found)


def check_pack(pack: dict, rows: list[dict]) -> None:
    selection = selection_from(pack)
    sequences = [sequence for row in rows for sequence in sequences_of(row)]
    assert selection.lengths.tolist() == list(selection.counts)
    assert pack["completion_lengths"].tolist() == [len(completion) for _, completion in sequences]
    at = 0
    for (prompt, completion), count in zip(sequences, selection.counts, strict=True):
        unscored = 1 if completion and not prompt else 0
        assert count == len(completion) - unscored
        targets = selection.targets[at : at + count].tolist()
        assert targets == completion[unscored:]
        for offset, row in enumerate(selection.rows[at : at + count].tolist()):
            history = prompt + completion[: unscored + offset]
            assert visible_history(pack, row) == list(enumerate(history))
        at += count
    assert at == len(selection.rows) == len(selection.targets)


def check_segments(segments: dict, length: int) -> None:
    assert segments["cu_q"].dtype == segments["cu_k"].dtype == torch.int32
    assert segments["kv_index"].dtype == torch.int64
    assert segments["cu_q"].diff().tolist() == segments["q_lens"]
    assert segments["cu_k"].diff().tolist() == segments["k_lens"]
    assert segments["cu_q"][0] == segments["cu_k"][0] == 0
    assert segments["cu_q"][-1] == length
    assert segments["cu_k"][-1] == len(segments["kv_index"])
    for q_len, k_len in zip(segments["q_lens"], segments["k_lens"], strict=True):
        assert k_len >= q_len
        assert q_len or not k_len


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(12))
def test_every_scored_token_sees_exactly_its_own_history(layout: str, seed: int) -> None:
    rng = random.Random(seed)
    rows = random_rows(rng, rng.randint(1, 5), skips=seed % 2 == 1)
    budget = rng.choice([None, 1, 12, 40])
    batch = PairCollator(layout, PAD, budget)(rows)
    assert next(iter(batch)) == "row_ids"
    assert batch["row_ids"].tolist() == [row["row_id"] for row in rows]
    covered = []
    for pack in batch["packs"]:
        members = pack["pair_index"].tolist()
        assert members == sorted(members)
        covered += members
        check_pack(pack, [rows[index] for index in members])
        if layout != "padded":
            check_segments(pack["segments"], pack["input_ids"].shape[1])
        if budget is not None and len(members) > 1:
            assert pack["input_ids"].numel() <= budget
    assert sorted(covered) == list(range(len(rows)))


@pytest.mark.parametrize("seed", range(12))
def test_layouts_score_the_same_tokens(seed: int) -> None:
    rows = random_rows(random.Random(seed), 4, skips=seed % 2 == 1)
    packs = [PairCollator(layout, PAD)(rows)["packs"][0] for layout in LAYOUTS]
    for pack in packs[1:]:
        for field in ("targets", "lengths", "completion_lengths", "pair_index"):
            assert torch.equal(pack[field], packs[0][field]), field
        assert pack["counts"] == packs[0]["counts"]
        assert pack["padded_tokens"] == packs[0]["padded_tokens"]


def test_prefix_shared_by_hand() -> None:
    rows = [make_row([1, 2], [3], [4, 5], row_id=7), make_row([6], [7, 8], [9], row_id=3)]
    batch = PairCollator("prefix_shared")(rows)
    (pack,) = batch["packs"]
    assert batch["row_ids"].tolist() == [7, 3]
    assert pack["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 1]]
    assert pack["rows"].tolist() == [1, 1, 3, 5, 6, 5]
    assert pack["targets"].tolist() == [3, 4, 5, 7, 8, 9]
    assert pack["lengths"].tolist() == pack["counts"] == [1, 2, 2, 1]
    segments = pack["segments"]
    assert segments["q_lens"] == [3, 2, 3, 1]
    assert segments["k_lens"] == [3, 4, 3, 2]
    assert segments["kv_index"].tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 5, 8]
    assert pack["tokens"] == 9
    assert pack["padded_tokens"] == 4 * 4


def test_padded_by_hand() -> None:
    (pack,) = PairCollator("padded", 99)([make_row([1, 2], [3], [4, 5])])["packs"]
    assert pack["input_ids"].tolist() == [[1, 2, 3, 99], [1, 2, 4, 5]]
    assert pack["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert pack["rows"].tolist() == [1, 5, 6]
    assert pack["tokens"] == 7
    assert "segments" not in pack


def test_packed_by_hand() -> None:
    (pack,) = PairCollator("packed")([make_row([1, 2], [3], [4, 5])])["packs"]
    assert pack["input_ids"].tolist() == [[1, 2, 3, 1, 2, 4, 5]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert pack["rows"].tolist() == [1, 4, 5]
    assert pack["segments"]["kv_index"].tolist() == list(range(7))
    assert "attention_mask" not in pack


def test_prompts_with_one_completion_by_hand() -> None:
    rows = [
        {"row_id": 7, "prompt_ids": [11, 12], "completion_ids": [13]},
        {"row_id": 9, "prompt_ids": [14], "completion_ids": [15, 16, 17]},
    ]
    batch = SequenceCollator()(rows)
    assert batch["row_ids"].tolist() == [7, 9]
    (pack,) = batch["packs"]
    assert pack["input_ids"].tolist() == [[11, 12, 13, 14, 15, 16, 17]]
    assert (pack["rows"].tolist(), pack["targets"].tolist()) == ([1, 3, 4, 5], [13, 15, 16, 17])
    assert pack["padded_tokens"] == 2 * 4
    packs = SequenceCollator("padded", PAD, tokens_per_pack=4)(rows)["packs"]
    assert [pack["input_ids"].tolist() for pack in packs] == [[[14, 15, 16, 17]], [[11, 12, 13]]]
    assert [pack["padded_tokens"] for pack in packs] == [4, 4]


def test_unequal_skips_are_stored_as_two_sequences() -> None:
    row = make_row([1, 2, 3], [4], [5], chosen_skip=0, rejected_skip=2)
    (pack,) = PairCollator("prefix_shared")([row])["packs"]
    assert pack["input_ids"].tolist() == [[1, 2, 3, 4, 3, 5]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert pack["rows"].tolist() == [2, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_completion_without_prompt_does_not_score_its_first_token(layout: str) -> None:
    (pack,) = PairCollator(layout, PAD)([make_row([], [3, 4, 5], [6])])["packs"]
    assert pack["counts"] == [2, 0]
    assert pack["targets"].tolist() == [4, 5]
    assert pack["completion_lengths"].tolist() == [3, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_completions_have_no_scored_token(layout: str) -> None:
    rows = [make_row([1, 2], [], [3]), make_row([1], [], []), make_row([4], [5], [])]
    (pack,) = PairCollator(layout, PAD)(rows)["packs"]
    assert pack["counts"] == [0, 1, 0, 0, 1, 0]
    assert pack["targets"].tolist() == [3, 5]


def test_reference_log_probs_follow_their_pairs() -> None:
    rows = [
        make_row([1] * size, [2], [3], ref_chosen_logps=-float(size), ref_rejected_logps=-0.5)
        for size in (1, 9, 2)
    ]
    batch = PairCollator("packed", tokens_per_pack=10)(rows)
    assert [pack["pair_index"].tolist() for pack in batch["packs"]] == [[1], [0, 2]]
    assert batch["packs"][1]["ref_logps"].tolist() == [-1.0, -0.5, -2.0, -0.5]
    assert batch["packs"][0]["ref_logps"].dtype == torch.float32
    del rows[1]["ref_rejected_logps"]
    with pytest.raises(ValueError, match="in all rows or in none"):
        PairCollator()(rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_tensors_and_lists_give_the_same_batch(layout: str) -> None:
    row = make_row([1, 2], [3], [4, 5])
    fields = ("prompt_ids", "chosen_ids", "rejected_ids")
    tensors = {**row, **{field: torch.tensor(row[field]) for field in fields}}
    arrays = {**row, **{field: torch.tensor(row[field]).int().numpy() for field in fields}}
    expected = PairCollator(layout, PAD)([row])["packs"][0]
    for other in (tensors, arrays):
        pack = PairCollator(layout, PAD)([other])["packs"][0]
        for field, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == pack[field].dtype
                assert torch.equal(value, pack[field]), field


def test_padded_token_shares_add_up_to_the_padded_batch() -> None:
    rows = random_rows(random.Random(5), 6)
    widths = [len(prompt) + len(side) for row in rows for prompt, side in sequences_of(row)]
    batch = PairCollator("packed", tokens_per_pack=20)(rows)
    assert len(batch["packs"]) > 1
    assert sum(pack["padded_tokens"] for pack in batch["packs"]) == len(widths) * max(widths)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("layout", ["packed", "prefix_shared"])
@pytest.mark.parametrize("seed", range(6))
def test_dense_mask_against_the_definition(layout: str, seed: int, window: int | None) -> None:
    rows = random_rows(random.Random(seed), 3, skips=True)
    (pack,) = PairCollator(layout)(rows)["packs"]
    length = pack["input_ids"].shape[1]
    owners: list[set[int]] = [set() for _ in range(length)]
    completion: list[int | None] = [None] * length
    at = 0
    for index, row in enumerate(rows):
        pieces = [
            (prompt, side, 2 * index + s) for s, (prompt, side) in enumerate(sequences_of(row))
        ]
        shared = layout == "prefix_shared" and pieces[0][0] == pieces[1][0]
        for prompt, side, sequence in pieces:
            if not (shared and sequence % 2):
                for _ in prompt:
                    owners[at] = {sequence, sequence + 1} if shared else {sequence}
                    at += 1
            for _ in side:
                owners[at], completion[at] = {sequence}, sequence
                at += 1
    assert at == length
    positions = pack["position_ids"][0].tolist()
    expected = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            distance = positions[query] - positions[key]
            same = owners[query] & owners[key]
            # Two positions of one sequence; a prompt never sees a completion that follows it.
            expected[query, key] = bool(same) and 0 <= distance < (window or length)
    mask = dense_mask(pack["segments"], length, window)
    assert mask.shape == (1, 1, length, length)
    assert mask.dtype == torch.bool
    assert torch.equal(mask[0, 0], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "dense"}, "layout: expected one of .*'padded', got 'dense'"),
        ({"layout": "padded"}, "pad_token_id: expected an int for layout 'padded', got None"),
        ({"tokens_per_pack": 0}, "tokens_per_pack: expected .* above 0, got 0"),
    ],
    ids=["layout", "pad token", "budget"],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairCollator(**arguments)


def test_wrong_rows() -> None:
    with pytest.raises(ValueError, match="expected at least one row, got none"):
        PairCollator()([])
    row = make_row([1], [2], [3])
    del row["rejected_ids"]
    with pytest.raises(ValueError, match="rejected_ids"):
        PairCollator()([row])
