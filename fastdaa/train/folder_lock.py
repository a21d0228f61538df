"""One run at a time in an output folder: a lock on a file, which the kernel lets go of.

It belongs to the process: it is gone with it, however that ends, and children do not inherit it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import weakref
from datetime import datetime, timezone
from pathlib import Path

logger = logging.getLogger(__name__)
LOCK_FILE = ".fastdaa_run.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_locks: weakref.WeakValueDictionary[Path, FolderLock] = weakref.WeakValueDictionary()


class FolderLock:
    """Held as long as this object lives; see :func:`lock_folder`."""

    def __init__(self, file: int):
        weakref.finalize(self, os.close, file)


def lock_folder(folder: str | Path) -> FolderLock | None:
    """Keep other processes that ask for it out of a folder, which is made where it is missing.

    A process may ask several times. Where folders cannot be locked (some network disks), a warning
    says so and there is no lock.

    Raises:
        BlockingIOError: another process has the lock; the message says which.
    """
    path = Path(folder).resolve() / LOCK_FILE
    held = _locks.get(path)
    if held is not None:
        return held
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = _locks[path] = FolderLock(_locked_file(path, folder))
    except BlockingIOError:
        raise
    except OSError as error:
        logger.warning(
            "output_dir: %s cannot be locked (%s); keep other runs out of it yourself", folder,
            error,
        )  # fmt: skip
        return None
    return lock


def _locked_file(path: Path, folder: str | Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(file, folder)
    except OSError:
        os.close(file)
        raise
    return file


def _take(file: int, folder: str | Path) -> None:
    try:
        import fcntl
    except ImportError as error:
        raise OSError("this system has no such locks") from error
    try:
        # Of POSIX: neither forked workers nor a launcher's children keep it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        raise BlockingIOError(
            f"output_dir: expected a folder into which no other run writes, {folder} is in use by "
            f"{_owner(file)}; choose another folder, or end that process"
        ) from error
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(owner).encode() + b"\n", 0)


def _owner(file: int) -> str:
    try:
        owner = json.loads(os.pread(file, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} (since {owner['started']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
