"""Files of a study that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` once that is done without an error.

    The folder is made. An ``OSError`` while it is written names the file.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, file)
    except OSError as error:
        if error.filename is None:  # a disk that is full does not say where
            error.filename = str(file)
        raise
    finally:
        partial.unlink(missing_ok=True)
