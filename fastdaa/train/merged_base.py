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

from accelerate import PartialState

from fastdaa.train.adapter_files import (
    MERGED_BASE,
    MERGED_RECORD,
    Adapter,
    adapter_digest,
    load_merged,
    merged_record,
)
from fastdaa.train.quantization import compute_as_in_training


def merged_base(
    adapter: Adapter,
    output_dir: str | Path,
    checkpoint: str | Path | None = None,
    *,
    tokenizer: Any = None,
    write: bool = True,
    quantized: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A causal language model with an adapter merged into it, saved as ``output_dir/base_model``.

    Its ``name_or_path`` is that folder: PEFT notes it in the configuration of a new adapter.
    Where it is to be quantised, it is merged and saved before that: codes could not take the
    changes of the adapter up without rounding.

    Args:
        adapter: what is merged into its base.
        output_dir: of the run.
        checkpoint: that the run continues from; the base that was saved then is loaded.
        tokenizer: is saved beside it.
        write: this process saves; the others only need the path.
        quantized: further options of ``from_pretrained``, with which the saved base is loaded. With
            them every process waits for the one that saves.
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
    # The finished adapter there needs the base that is there.
    needed = folder.is_dir() and (folder.parent / "adapter_config.json").is_file()
    model: Any = None
    saved = None
    if checkpoint is not None or needed:
        saved = _saved_base(folder, None if checkpoint is None else Path(checkpoint), record)
    if quantized is None or (write and saved != folder):
        if saved is None:
            model = load_merged(adapter, AutoModelForCausalLM, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(str(saved), **options)
    if write and saved != folder:
        _save(model, folder, record, tokenizer)
    if quantized is not None:
        del model
        PartialState().wait_for_everyone()
        model = AutoModelForCausalLM.from_pretrained(str(folder), **options, **quantized)
        compute_as_in_training(model)
    model.name_or_path = model.config._name_or_path = str(folder)
    return model


def _saved_base(folder: Path, checkpoint: Path | None, record: dict[str, str]) -> Path:
    """Where the merged base of an earlier start is, which had to be of the same adapter."""
    option, places = "output_dir", [folder]
    if checkpoint is not None:
        # It may be of a run in another output folder.
        option = "resume_from_checkpoint"
        places.append(checkpoint.absolute().parent / MERGED_BASE)
    for place in places:
        found = merged_record(place)
        if found is None:
            continue
        changed = [
            f"{name} {found.get(name)!r} then, {record[name]!r} now"
            for name in ("digest", "dtype")
            if found.get(name) != record[name]
        ]
        if not changed:
            return place
        raise ValueError(
            f"{option}: expected the adapter {found.get('adapter')}, which was merged into "
            f"{place}, got {record['adapter']} ({'; '.join(changed)}); choose another output_dir "
            "for a new run"
        )
    raise ValueError(
        f"{option}: expected the merged base model of the run in {places[-1]}, there is none with "
        f"its {MERGED_RECORD}"
    )


def _save(model: Any, folder: Path, record: dict[str, str], tokenizer: Any) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    (partial / MERGED_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
