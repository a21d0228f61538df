"""Which versions of TRL the drop-in trainer is known to fit."""

from __future__ import annotations

from importlib import metadata

LOWEST, BELOW = (1, 16), (1, 17)


def check_version() -> None:
    """Raise unless the installed TRL is one that the drop-in trainer was compared with.

    Raises:
        ImportError: no TRL, or another version.
    """
    expected = f"expected trl >= {_dotted(LOWEST)}, < {_dotted(BELOW)}"
    install = f"pip install 'trl>={_dotted(LOWEST)},<{_dotted(BELOW)}'"
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise ImportError(f"fastdaa.drop_in.trl: {expected}, got none; {install}") from None
    numbers = version.split(".")[:2]
    if not (
        all(number.isdecimal() for number in numbers) and LOWEST <= tuple(map(int, numbers)) < BELOW
    ):
        raise ImportError(f"fastdaa.drop_in.trl: {expected}, got {version}; {install}")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
