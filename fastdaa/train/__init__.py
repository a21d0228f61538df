"""Preference training of Hugging Face causal language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdaa.train.config import PreferenceConfig
    from fastdaa.train.trainer import PreferenceTrainer

__all__ = ["PreferenceConfig", "PreferenceTrainer"]

_HOME = {"PreferenceConfig": "config", "PreferenceTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    # Importing one room of this package should not cost the import of the whole Trainer.
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
