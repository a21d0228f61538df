"""Small tiles for small problems."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from fastdaa import memory


@contextmanager
def tiles_of(rows: int | None, vocab_size: int) -> Iterator[None]:
    """Default budgets of so many whole rows of fp32 logits; None leaves them as they are."""
    if rows is None:
        yield
        return
    size = 4 * vocab_size * rows
    with patch.multiple(memory, _CPU_BYTES=(size, size), _DEVICE_BYTES=(size, size)):
        yield
