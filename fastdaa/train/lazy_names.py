"""Names of a package that are imported at their first use (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names live in its modules.

    Importing one module of the package then does not cost the import of the others.

    Args:
        package: its ``__name__``.
        modules: from public names to the modules that hold them.
    """

    def get(name: str) -> Any:
        if name in modules:
            return getattr(import_module(f"{package}.{modules[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        """Public names, modules that are loaded, and what Python puts into every module."""
        loaded = (
            name
            for name, value in vars(sys.modules[package]).items()
            if name.startswith("__") or getattr(value, "__name__", "").startswith(f"{package}.")
        )
        return sorted({*modules, *loaded})

    return get, names
