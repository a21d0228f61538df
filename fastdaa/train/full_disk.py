"""A disk that is full while something is saved: which folder, and what is kept."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdaa.train.checkpoints import last_complete

# The last is that of a file that would exceed `ulimit -f`.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch, safetensors and tokenizers have errors of their own for a file that could not be written.
_SAID = re.compile(
    r"No space left|os error 2[78]\b|Disk quota|inline_container|PytorchStreamWriter|iostream error"
)
_GONE = re.compile(r"Parent directory .* does not exist|os error 2\b")


class FullDiskError(OSError):
    """The disk of a run is full; the message says where, and what is kept."""


@contextmanager
def full_disk_named(output_dir: str | Path, what: str) -> Iterator[None]:
    """Says where the disk is full, of errors that do not.

    Args:
        output_dir: of the run.
        what: is being written, for the message.

    Raises:
        FullDiskError: the disk is full.
        FileNotFoundError: somebody has removed the folder.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:  # of no other class, where tokenizers raises it
        if _GONE.search(str(error)):
            raise FileNotFoundError(
                f"output_dir: expected {output_dir} to stay while the run lives, but a folder was "
                f"removed while {what} was written ({' '.join(str(error).split())})"
            ) from error
        if not is_full_disk(error):
            raise
        raise FullDiskError(_message(error, Path(output_dir), what)) from error


@contextmanager
def full_cache_named(folder: Path) -> Iterator[None]:
    """As :func:`full_disk_named`, of the folder of cached reference log-probs.

    Raises:
        FullDiskError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise FullDiskError(
            f"ref_cache_dir: expected room on the disk for reference log-probs, writing into "
            f"{folder} failed ({error}); what was written stays there. Make room, or give another "
            "folder"
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of the operating system, torch or safetensors is about a full disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_SPACE
    return bool(_SAID.search(str(error)))


def _message(error: BaseException, output_dir: Path, what: str) -> str:
    last = last_complete(output_dir)
    kept = "no checkpoint was finished before"
    if last is not None:
        kept = f"{last} is whole, and --resume_from_checkpoint continues from it"
    place = getattr(error, "filename", None) or output_dir
    return (
        f"output_dir: expected room on the disk for {what}, writing into {place} failed with "
        f"{_free(output_dir)} left on its disk ({' '.join(str(error).split())}); {kept}. Make "
        "room, or keep fewer checkpoints (--save_total_limit)"
    )


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB"
    except OSError:
        return "an unknown amount"
