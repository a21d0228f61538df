"""The base that a run has made by merging an adapter: kept in its output folder.

The new adapter of the run is worth something on this base alone, so its ``adapter_config.json`` has
to point to it, and a continued run has to load it rather than merge again.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastdaa.train.adapter_files import MERGED_BASE, Adapter, adapter_digest, load_merged

_RECORD = "fastdaa_merged.json"


def merged_base(
    adapter: Adapter,
    output_dir: str | Path,
    checkpoint: str | Path | None = None,
    *,
    tokenizer: Any = None,
    write: bool = True,
    **options: Any,
) -> Any:
    """A causal language model with an adapter merged into it, saved as ``output_dir/base_model``.

    Its ``name_or_path`` is that folder: PEFT notes it in the configuration of a new adapter.

    Args:
        adapter: what is merged into its base.
        output_dir: of the run.
        checkpoint: that the run continues from; the base that was saved then is loaded.
        tokenizer: is saved beside it.
        write: this process saves; the others only need the path.
        options: passed on to ``from_pretrained`` of the base.

    Raises:
        OSError, ValueError: adapter or base cannot be read or merged; or the folder holds the base
            of another adapter.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(output_dir).expanduser().absolute() / MERGED_BASE
    record = {
        "adapter": adapter.source,
        "base": adapter.base,
        "digest": adapter_digest(adapter),
        "dtype": str(options.get("dtype", "auto")),
    }
    if checkpoint is not None:
        saved = _saved_base(folder, Path(checkpoint), record)
        model: Any = AutoModelForCausalLM.from_pretrained(str(saved), **options)
        if write and saved != folder:
            _save(model, folder, record, tokenizer)
    else:
        # The finished adapter there needs the base that is there.
        if folder.is_dir() and (folder.parent / "adapter_config.json").is_file():
            raise ValueError(
                f"output_dir: expected a folder without an adapter of another run, "
                f"{folder.parent} holds one on {folder}, which would be written over; choose "
                "another folder"
            )
        model = load_merged(adapter, AutoModelForCausalLM, **options)
        if write:
            _save(model, folder, record, tokenizer)
    model.name_or_path = model.config._name_or_path = str(folder)
    return model


def _saved_base(folder: Path, checkpoint: Path, record: dict[str, str]) -> Path:
    """Where the merged base of the run that wrote ``checkpoint`` is."""
    # The checkpoint may be of a run in another output folder.
    for place in (folder, checkpoint.absolute().parent / MERGED_BASE):
        try:
            found = json.loads((place / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        changed = [
            f"{name} {found.get(name)!r} then, {record[name]!r} now"
            for name in ("digest", "dtype")
            if found.get(name) != record[name]
        ]
        if not changed:
            return place
        raise ValueError(
            f"resume_from_checkpoint: expected the adapter that was merged into {place} "
            f"({found.get('adapter')}), got {record['adapter']} ({'; '.join(changed)})"
        )
    raise ValueError(
        f"resume_from_checkpoint: expected the merged base model of {checkpoint} in {folder}, there "
        "is none"
    )


def _save(model: Any, folder: Path, record: dict[str, str], tokenizer: Any) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    (partial / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
