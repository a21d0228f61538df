"""A number with what it counts, for messages."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """``1 pair``, ``1,234 pairs``; ``2 policies``, ``2 losses``: ``thing`` is in the singular."""
    if number == 1:
        return f"1 {thing}"
    if thing.endswith("y") and thing[-2:-1] not in "aeou":
        return f"{number:,} {thing[:-1]}ies"
    return f"{number:,} {thing}{'es' if thing.endswith('s') else 's'}"
