"""Which run a folder belongs to, and what that run trains: ``fastdaa_run.json``.

The one in an output folder is of the run that was started there last; the one in a checkpoint is of
the run that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdaa.counted import counted
from fastdaa.data.fields import LABEL_FIELD

RUN_FILE = "fastdaa_run.json"
_SAMPLED_ROWS, _SAMPLED_WEIGHTS = 256, 64


class RunRecord(NamedTuple):
    """One run."""

    started: str
    """When, in UTC."""
    facts: dict[str, Any]
    """What may not change while it is interrupted, by name; JSON values."""
    steps: list[int]
    """Of the checkpoints that it has begun to write."""
    best: int | None = None
    """Of the checkpoint that was loaded at its end, where that is not the last."""


def new_record(facts: Mapping[str, Any]) -> RunRecord:
    """Of a run that starts now."""
    return RunRecord(datetime.now(timezone.utc).isoformat(timespec="seconds"), {**facts}, [])


def read_record(folder: str | Path) -> RunRecord | None:
    """The record in a folder, or None where there is none that can be read."""
    try:
        read = json.loads((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))
        return RunRecord(read["started"], read["facts"], read["steps"], read.get("best"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(folder: str | Path, record: RunRecord) -> None:
    """Put a record into a folder, at once; the folder is made where it is missing."""
    path = Path(folder) / RUN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record._asdict(), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def remove_record(folder: str | Path) -> None:
    """Where a run starts that keeps no record."""
    (Path(folder) / RUN_FILE).unlink(missing_ok=True)


def check_same_run(checkpoint: str | Path, facts: Mapping[str, Any]) -> None:
    """Compare what a checkpoint was trained on with what is to be trained now.

    Raises:
        ValueError: it is something else. A checkpoint without a record is not compared.
    """
    record = read_record(checkpoint)
    if record is None:
        return
    # Records of before the adapter was one of the facts are not asked for it.
    more = (name for name in facts if name not in record.facts and name != "adapter")
    names = [*record.facts, *more]
    changed = [
        f"{name} {record.facts.get(name)!r} then, {facts.get(name)!r} now"
        for name in names
        if record.facts.get(name) != facts.get(name)
    ]
    if changed:
        raise ValueError(
            f"resume_from_checkpoint: expected the run of {checkpoint}, got another one "
            f"({'; '.join(changed)}); choose another output_dir for a new run, with that "
            "checkpoint as its model to start from its weights"
        )


def rows_fact(rows: Any) -> str | None:
    """The number of tokenised rows and a digest of some, spread over all; None of None."""
    if rows is None:
        return None
    sampled = np.unique(np.linspace(0, len(rows) - 1, _SAMPLED_ROWS).astype(np.int64))
    digest = hashlib.sha256()
    for row in rows.__getitems__(sampled.tolist()):
        for field in type(rows).tokens:
            ids = np.asarray(row[field], dtype=np.int64)
            digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
        if LABEL_FIELD in row:
            digest.update(bytes([row[LABEL_FIELD]]))
    return f"{counted(len(rows), 'row')} {digest.hexdigest()[:12]}"


@torch.no_grad()
def weights_fact(model: nn.Module, *, trainable: bool = True) -> str:
    """The dtype of a model and a digest of some weights, spread over all, also of quantised ones.

    Args:
        trainable: count those that require a gradient, too.
    """
    digest, dtypes = hashlib.sha256(), set()
    for name, weight in model.named_parameters():
        counts = trainable or not weight.requires_grad
        if not counts or weight.is_meta:
            continue
        digest.update(f"{name} {list(weight.shape)}".encode() + _sample(weight))
        dtypes.add(str(weight.dtype).removeprefix("torch."))
        # Codes of 4 bits mean something with their scales alone.
        scales = getattr(getattr(weight, "quant_state", None), "absmax", None)
        if scales is not None:
            digest.update(_sample(scales))
    return f"{'+'.join(sorted(dtypes))} {digest.hexdigest()[:12]}"


def _sample(tensor: Tensor) -> bytes:
    count = min(tensor.numel(), _SAMPLED_WEIGHTS)
    places = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long()
    values: np.ndarray = tensor.detach().flatten()[places.to(tensor.device)].float().cpu().numpy()
    return values.tobytes()
