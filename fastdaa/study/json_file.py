"""JSON files of a study, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write one JSON object, atomically; its folder is made.

    Raises:
        ValueError: NaN or an infinity in it; nothing is written then.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
