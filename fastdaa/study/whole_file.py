"""Files of a study that are there as a whole or not at all, and folders that can take them."""

from __future__ import annotations

import os
import tempfile
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


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder and write into it, before anything is computed that is to be kept there.

    Raises:
        OSError: it cannot be made or written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".fastdaa-", dir=folder))
    except OSError as error:
        raise OSError(
            f"output_dir: expected a folder to write to, {os.fspath(folder)} cannot be written or "
            f"created: {error.strerror}"
        ) from error
