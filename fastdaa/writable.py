"""Whether results can be written where they are wanted: asked before anything is computed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_writable(folder: str | os.PathLike[str], option: str = "output_dir") -> None:
    """Write where ``folder`` is or will be: neither modes nor mounts tell it as surely.

    Nothing is left behind, and the folder is not made.

    Args:
        option: in which the folder was named, for the message.

    Raises:
        OSError: nothing can be written there.
        NotADirectoryError: it, or what should hold it, is a file.
    """
    path = Path(folder)
    try:
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        is_folder = existing.is_dir()
        if is_folder:
            os.rmdir(tempfile.mkdtemp(prefix=".fastdaa-", dir=existing))
    except OSError as error:
        raise OSError(
            f"{option}: expected a folder to write to, {path} cannot be written or created: "
            f"{error.strerror}"
        ) from error
    if not is_folder:
        raise NotADirectoryError(f"{option}: expected a folder, {existing} is a file")
