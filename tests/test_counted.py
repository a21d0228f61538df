"""A number and what it counts: one of a thing is no plural, in any message."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fastdaa.counted import counted

PACKAGE = Path(__file__).resolve().parents[1] / "fastdaa"
# The engine's plans and the kernels count tokens and columns by the thousand.
ROOMS = ("benchmarks", "cli", "data", "demo", "losses", "online", "study", "train")
SOURCES = [path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py"))]
_PLURAL = re.compile(r"^[ \u00a0]([a-z-]+ )?[a-z]{2,}[^s\W]s\b")


@pytest.mark.parametrize(
    ("number", "thing", "expected"),
    [
        (1, "pair", "1 pair"),
        (0, "pair", "0 pairs"),
        (1234, "different prompt", "1,234 different prompts"),
        (2, "policy", "2 policies"),
        (1, "policy", "1 policy"),
        (2, "loss", "2 losses"),
        (3, "process", "3 processes"),
        (2, "key", "2 keys"),
    ],
)
def test_one_of_a_thing_is_singular(number: int, thing: str, expected: str) -> None:
    assert counted(number, thing) == expected


def test_no_length_stands_before_a_plural() -> None:
    """``f"{len(pairs)} pairs"`` says ``1 pairs`` of one."""
    found = [
        f"{path.relative_to(PACKAGE)}:{number.lineno}: {ast.unparse(number)}{words.value[:20]!r}"
        for path in SOURCES
        for text in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(text, ast.JoinedStr)
        for number, words in zip(text.values, text.values[1:], strict=False)
        if isinstance(number, ast.FormattedValue) and isinstance(words, ast.Constant)
        if isinstance(number.value, ast.Call) and ast.unparse(number.value.func) == "len"
        if _PLURAL.match(str(words.value))
    ]
    assert found == []
