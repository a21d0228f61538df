"""Whether the files of a checkpoint can be continued from: looked at before anything is loaded.

A machine that loses power, or a copy that breaks off, leaves files empty or cut off, although the
one that was written last is there. And where the optimizer's file is missing, the Trainer would
begin with a new one and a new schedule, and not say so.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

_ONLINE = ("state.pt", "critic.safetensors")
"""What checkpoints of ``fastdaa online`` have in place of the Trainer's files."""
# FSDP has its optimizer in a folder, and every process its random states in a file.
_NEEDED = {
    "optimizer.pt": "optimizer*",
    "scheduler.pt": "scheduler.pt",
    "rng_state.pth": "rng_state*.pth",
}
# Tokenizers are not read from checkpoints, and can be large.
_SMALL = 1 << 20
_INDEX = "*.safetensors.index.json"


def defect(checkpoint: str | Path) -> str | None:
    """Why a run cannot go on from a checkpoint, in a few words; None if nothing speaks against it.

    Headers and ends of files are looked at, not their content.
    """
    folder = Path(checkpoint)
    return _missing(folder) or _damaged(folder)


def _missing(folder: Path) -> str | None:
    names = {path.name for path in folder.iterdir()}
    if names.intersection(_ONLINE):
        wanted = [*_ONLINE, "model.safetensors"]
        return _has_no([name for name in wanted if name not in names])
    for index in folder.glob(_INDEX):
        try:
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError):
            return f"has a damaged {index.name}"
        if not names.issuperset(parts):
            return _has_no(sorted({*parts} - names))
    if any(name.startswith("global_step") for name in names):
        # DeepSpeed's, all in folders of its own, one of which the file names.
        return None if "latest" in names else _has_no(["latest"])
    absent = [name for name, pattern in _NEEDED.items() if not any(folder.glob(pattern))]
    if absent == [*_NEEDED]:
        return "holds the model alone, as --save_only_model saves it"
    return _has_no(absent if any(map(_holds_weights, names)) else ["weights", *absent])


def _holds_weights(name: str) -> bool:
    # Sharded ones of FSDP are in a folder.
    return "model" in name and name.endswith((".safetensors", ".bin", "_fsdp_0"))


def _has_no(names: list[str]) -> str | None:
    return f"has no {', '.join(names)}" if names else None


def _damaged(folder: Path) -> str | None:
    for path in sorted([*folder.iterdir(), *folder.glob("global_step*/*")]):
        if not path.is_file():
            continue
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="numpy"):
                    continue
            except SafetensorError as error:
                return f"has a damaged {path.name} ({error})"
        if path.suffix == ".json" and path.stat().st_size < _SMALL:
            try:
                json.loads(path.read_bytes())
            except ValueError as error:
                return f"has a damaged {path.name} ({error})"
        # What torch.save writes is a zip, whose directory is at its end.
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"has a damaged {path.name} (its end is missing)"
    return None
