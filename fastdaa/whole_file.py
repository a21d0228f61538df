"""Files and folders that are there as a whole or not at all.

They are written beside their place, under a lock that the kernel lets go of when a process ends,
however that happens. What can be locked there was left by a process that was killed, and goes.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write to, which takes the place of ``path`` once that is done without an error.

    The folder is made. An ``OSError`` while it is written names the file.
    """
    file = Path(path)
    try:
        with naming(file), unfinished(file) as partial:
            yield partial
            os.replace(partial, file)
    except OSError as error:
        if str(error.filename).endswith(".partial"):  # which nobody knows
            error.filename = str(file)
            del error.filename2
        raise


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """An ``OSError`` within names ``file``, where it names none: a full disk does not say where."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


@contextmanager
def unfinished(path: str | os.PathLike[str], *, folder: bool = False) -> Iterator[Path]:
    """An empty file or folder beside ``path``, to be renamed by the caller; else it is removed.

    It is to be written in place: another file renamed to its name would be without the lock. What
    killed processes left while they wrote the same ``path`` is removed first.
    """
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(place.parent, f".{glob.escape(place.name)}.*.partial")
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    lock = _make(partial, folder)
    try:
        yield partial
    finally:
        if _is_open_at(partial, lock):
            _remove(partial)
        os.close(lock)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove the files and folders of a pattern that no living process holds.

    Where a disk knows no locks, everything stays.
    """
    for path in folder.glob(pattern):
        try:
            lock = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        except OSError:
            continue
        try:
            if _lock(lock, wait=False) and _is_open_at(path, lock):
                _remove(path)
        finally:
            os.close(lock)


def _make(path: Path, folder: bool) -> int:
    """An open descriptor of ``path``, locked where the disk has locks."""
    while True:
        lock = _open_folder(path) if folder else os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        # Between the two, another process may have taken it for abandoned.
        if not _lock(lock, wait=True) or _is_open_at(path, lock):
            return lock
        os.close(lock)


def _open_folder(path: Path) -> int:
    while True:
        path.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process was quick to remove it
            return os.open(path, os.O_RDONLY)


def _lock(file: int, *, wait: bool) -> bool:
    try:
        import fcntl

        # Of the open file and not of the process: closing the same file elsewhere keeps it.
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


def _is_open_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
