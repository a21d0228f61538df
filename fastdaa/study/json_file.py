"""JSON files of a study, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from fastdaa.whole_file import whole_file


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write one JSON object, atomically; its folder is made.

    Raises:
        ValueError: NaN or an infinity in it; nothing is written then.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
