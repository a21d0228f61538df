"""Quality against KL on real runs: samples, KL estimates, scores, and a warning, checkpoint by
checkpoint."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdaa.study.track.callback import TrackQuality
    from fastdaa.study.track.settings import TrackSettings

__all__ = ["TrackQuality", "TrackSettings"]

_HOME = {"TrackQuality": "callback", "TrackSettings": "settings"}


def __getattr__(name: str) -> Any:
    # The settings alone should not cost the import of the Trainer.
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, modules that are loaded, and what Python puts into every module."""
    loaded = (
        name
        for name, value in globals().items()
        if name.startswith("__") or getattr(value, "__name__", "").startswith(f"{__name__}.")
    )
    return sorted({*__all__, *loaded})
