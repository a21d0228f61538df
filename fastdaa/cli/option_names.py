"""Errors of settings that an option of another name has given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def named_as(**options: str) -> Iterator[None]:
    """Errors that begin with a name among ``options`` begin with that option instead."""
    try:
        yield
    except (ValueError, OSError) as error:
        name, colon, rest = str(error).partition(":")
        if not colon or name not in options:
            raise
        raise ValueError(f"{options[name]}:{rest}") from error
