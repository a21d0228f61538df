"""Small pieces of the report's sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NO_VALUE = "n/a"
_LEAST = 1e-4
"""What is smaller is shown as 0."""


def number(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """A number with a fixed count of decimals, and never ``-0.00``.

    Two digits of one that is smaller than the last decimal, and whole ones from 10,000 on.
    """
    if value is None:
        return NO_VALUE
    plus = "+" if sign else ""
    if _LEAST <= abs(value) < 10**-digits:
        return f"{value:{plus}.2g}"
    if abs(value) >= 1e4:
        return f"{value:{plus},.0f}"
    return f"{round(value, digits) + 0.0:{plus}.{digits}f}"


def with_error(value: float, error: float | None, digits: int = 2) -> str:
    """``0.170 ± 0.013`` on one line; the number alone without an error."""
    text = number(value, digits)
    return text if error is None else f"{text}\u00a0±\u00a0{number(error, digits)}"


def capitalised(text: str) -> str:
    """With a capital letter at the start."""
    return text[:1].upper() + text[1:]


def join(words: Sequence[str]) -> str:
    """``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def span(values: Sequence[float], digits: int = 2) -> str:
    """``0.10 to 0.25``, or the one value."""
    low, high = number(min(values), digits), number(max(values), digits)
    return low if low == high else f"{low} to {high}"


def preset_suffix(preset: Any) -> str:
    """What follows a title: the preset's name, if there is one."""
    return "" if preset is None else f", preset {preset}"
