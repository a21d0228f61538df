"""Packing: budgets are kept, nothing is lost, the same lengths give the same packs."""

from __future__ import annotations

import random

import pytest

from fastdaa.data import pack_by_length, pack_by_width


def first_fit_decreasing(lengths: list[int], budget: int) -> list[list[int]]:
    """The textbook algorithm, quadratic."""
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for pack in packs:
            if sum(lengths[i] for i in pack) + lengths[index] <= budget:
                pack.append(index)
                break
        else:
            packs.append([index])
    return [sorted(pack) for pack in packs]


@pytest.mark.parametrize("seed", range(30))
def test_packs_are_those_of_the_textbook_algorithm(seed: int) -> None:
    rng = random.Random(seed)
    budget = rng.randint(1, 60)
    lengths = [rng.randint(0, 40) for _ in range(rng.randint(1, 70))]
    assert pack_by_length(lengths, budget) == first_fit_decreasing(lengths, budget)


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 5, []),
        ([3], 5, [[0]]),
        ([9, 1, 1], 5, [[0], [1, 2]]),
        ([2, 5, 3], 5, [[1], [0, 2]]),
        ([0, 0], 1, [[0, 1]]),
        ([9, 0], 5, [[0], [1]]),
    ],
    ids=["none", "one", "too long alone", "pairs up", "empty items", "over-long pack is closed"],
)
def test_small_cases(lengths: list[int], budget: int, expected: list[list[int]]) -> None:
    assert pack_by_length(lengths, budget) == expected


@pytest.mark.parametrize("seed", range(20))
def test_width_packs_hold_their_rectangle(seed: int) -> None:
    rng = random.Random(seed)
    budget = rng.randint(1, 200)
    widths = [rng.randint(1, 40) for _ in range(rng.randint(1, 40))]
    packs = pack_by_width(widths, budget)
    assert sorted(i for pack in packs for i in pack) == list(range(len(widths)))
    for pack in packs:
        assert pack == sorted(pack)
        assert len(pack) == 1 or 2 * len(pack) * max(widths[i] for i in pack) <= budget


def test_width_packs_put_similar_widths_together() -> None:
    assert pack_by_width([9, 2, 10, 2, 2], 40) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("pack", [pack_by_length, pack_by_width])
def test_wrong_arguments(pack) -> None:
    with pytest.raises(ValueError, match="budget: expected at least 1 token, got 0"):
        pack([1], 0)
    with pytest.raises(ValueError, match="lengths: expected numbers of at least 0, got -1"):
        pack([3, -1], 4)
