"""Grouping of pairs into packs under a token budget, on the host and without randomness."""

from __future__ import annotations

from collections.abc import Sequence


def pack_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Groups items so that the lengths in one group sum to at most ``budget``.

    First-fit decreasing, ties by index, so the same lengths always give the same groups, and the
    groups use at most 11/9 of the optimal number plus one (Johnson 1973). An item longer than the
    budget gets a group of its own. Runs in ``O(n log n)``.

    Args:
        lengths: tokens of each item, each at least 0.
        budget: tokens that one group may hold, at least 1.

    Returns:
        Groups of indices into ``lengths``: ascending inside a group; the group with the longest
        item first, so that the largest allocation of a batch comes first.

    Raises:
        ValueError: a budget below 1 or a negative length.
    """
    _check(lengths, budget)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    # A max-tree over the room left in every group; a group that is not open yet has all its room.
    room = [budget] * (2 * leaves)
    packs: list[list[int]] = []
    for index in order:
        length = min(lengths[index], budget)
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        slot = node - leaves
        if slot == len(packs):
            packs.append([])
        packs[slot].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [sorted(pack) for pack in packs]


def pack_by_width(widths: Sequence[int], budget: int, *, rows_per_item: int = 2) -> list[list[int]]:
    """Groups items so that the padded rectangle of one group holds at most ``budget`` tokens.

    The rectangle has ``rows_per_item`` rows per item, each as wide as the group's widest item.
    Widest first, so that similar widths share a group. An item whose own rectangle exceeds the
    budget gets a group of its own.

    Args:
        widths: tokens of the longest row of each item.
        budget: tokens, padding included, that one group may hold.
        rows_per_item: rows of each item; 2 for a pair.

    Returns:
        Groups of indices into ``widths``, ascending inside a group.

    Raises:
        ValueError: a budget below 1 or a negative width.
    """
    _check(widths, budget)
    packs: list[list[int]] = []
    widest = 0
    for index in sorted(range(len(widths)), key=lambda index: (-widths[index], index)):
        if packs and rows_per_item * (len(packs[-1]) + 1) * widest <= budget:
            packs[-1].append(index)
        else:
            packs.append([index])
            widest = widths[index]
    return [sorted(pack) for pack in packs]


def _check(lengths: Sequence[int], budget: int) -> None:
    if budget < 1:
        raise ValueError(f"budget: expected at least 1 token, got {budget}")
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths: expected numbers of at least 0, got {min(lengths)}")
