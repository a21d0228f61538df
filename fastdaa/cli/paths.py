"""Paths and hub ids that the training commands are given, checked before anything slow."""

from __future__ import annotations

import difflib
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fastdaa.cli.quantization import check_quantized
from fastdaa.cli.runs import hold_folder
from fastdaa.data.sources import parse_source
from fastdaa.train.checkpoints import check_files, complete, is_complete, to_continue
from fastdaa.writable import check_writable

if TYPE_CHECKING:
    from fastdaa.cli.arguments import ModelArguments
    from fastdaa.train.adapter_files import Adapter

logger = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MODEL_FILES = ("config.json", "adapter_config.json")
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".gz")
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
# What the Trainer itself understands as "the last checkpoint".
_TRUE_WORDS = ("true", "yes", "1", "last")


def check_paths(arguments: ModelArguments, output_dir: str, resume: str | None) -> str | None:
    """Checks every local path before anything slow, and finds the checkpoint to resume from.

    Args:
        resume: what ``--resume_from_checkpoint`` says.

    Raises:
        OSError: a path or hub id of nothing, or an ``output_dir`` that cannot be written or is in
            use by another run.
        ValueError: a folder without a model, an incomplete checkpoint, or an ``output_dir`` that
            holds another run or model.
    """
    for name in ("dataset", "eval_dataset"):
        for source in getattr(arguments, name) or ():
            _check_exists(name, parse_source(source).path, _DATA_SUFFIXES)
    folder = Path(output_dir)
    check_writable(folder)
    _check_other_models(arguments, folder)
    checkpoint = _find_checkpoint(output_dir, resume)
    # The hub is asked last, since it may take its time.
    for name in ("model", "ref_model"):
        value = getattr(arguments, name, None)
        revision = getattr(arguments, f"{name}_revision", None)
        if value is not None:
            check_model(name, value, revision)
        elif revision is not None:
            raise ValueError(f"{name}_revision: expected {name} beside it, got none")
    _check_adapters(arguments, folder)
    _check_no_model(folder, checkpoint)
    check_quantized(arguments)
    if folder.is_dir():
        hold_folder(output_dir)
    return checkpoint


def check_model(name: str, value: str, revision: str | None = None) -> None:
    """Looks for a model in a folder or on the hub, without reading its weights.

    Args:
        name: of the option, for the message.
        value: what it says.
        revision: of a model on the hub.

    Raises:
        OSError: there is neither such a folder nor such a model on the hub.
        ValueError: the folder holds no model, or it is a file.
    """
    _check_exists(name, value, ())
    folder = Path(value).expanduser()
    if folder.is_file():
        function = "; a function is given as file.py:function" if name.endswith("reward") else ""
        raise ValueError(f"{name}: expected a folder or a hub id, {value} is a file{function}")
    if not folder.is_dir():
        _check_hub(name, value, revision)
        return
    if revision not in (None, "main"):
        raise ValueError(
            f"{name}_revision: expected a model of the hub, which has revisions, got {revision!r} "
            f"for the folder {value}"
        )
    if not any((folder / file).is_file() for file in _MODEL_FILES):
        raise ValueError(f"{name}: expected a folder with config.json, {value} has none")
    _check_readable(name, folder)
    adapter = adapter_of(name, value)
    if adapter is not None:
        base = f"{name}: base model of the adapter {value}"
        check_model(base, adapter.base, adapter.base_options.get("revision"))


def _check_readable(name: str, folder: Path) -> None:
    """Of a file that is there and cannot be read, safetensors says that there is none."""
    for path in folder.iterdir():
        if path.is_file() and not os.access(path, os.R_OK):
            raise PermissionError(f"{name}: expected files that can be read, {path} cannot")


def adapter_of(name: str, value: str) -> Adapter | None:
    """The adapter in a folder or on the hub; None for a whole model.

    Args:
        name: of the option, for the message.
        value: what it says.

    Raises:
        FileNotFoundError, ValueError: an adapter without its base, or half of one.
    """
    from fastdaa.train.adapter_files import find_adapter

    try:
        return find_adapter(value)
    except (OSError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _holds_adapter(folder: Path) -> bool:
    return (folder / _MODEL_FILES[1]).is_file()


def _check_hub(name: str, value: str, revision: str | None) -> None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from transformers.utils import cached_file, find_adapter_config_file

    if revision is not None and find_adapter_config_file(value, revision=revision) is not None:
        raise ValueError(
            f"{name}_revision: expected a whole model, got the adapter {value}; download that "
            "revision, and give the folder"
        )
    found = (try_to_load_from_cache(value, file, revision=revision) for file in _MODEL_FILES)
    if any(isinstance(path, str) for path in found):
        return
    logger.info("%s: there is no folder %s; asking the hub", name, value)
    for file in _MODEL_FILES:
        try:
            cached_file(value, file, revision=revision)
            return
        except OSError as error:
            last = error
        # Only where the hub has the rest is it worth asking for another file.
        missing = isinstance(last.__cause__, EntryNotFoundError)
        if not missing or isinstance(last.__cause__, LocalEntryNotFoundError):
            break
    what = (str(last).strip().splitlines() or [type(last).__name__])[0]
    raise OSError(
        f"{name}: expected a local folder or a hub id, there is no folder {value!r}, and asking "
        f"the hub: {what}"
    ) from last


def _check_exists(name: str, value: str, suffixes: tuple[str, ...]) -> None:
    path = Path(value).expanduser()
    if path.exists():
        return
    if _HUB_ID.fullmatch(value) and not value.lower().endswith(suffixes or ("/",)):
        return
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""
    if suffixes and "," in value:
        hint = " (several are separated by spaces)"
    raise FileNotFoundError(f"{name}: expected a path or a hub id, there is no {value!r}{hint}")


def _check_other_models(arguments: ModelArguments, folder: Path) -> None:
    """Keeps the model of a run apart from those that are there."""
    for name in ("model", "ref_model"):
        value = getattr(arguments, name, None)
        if value is not None and folder.is_dir() and Path(value).resolve() == folder.resolve():
            raise ValueError(
                f"output_dir: expected another folder than that of {name}, got {folder} for both; "
                "the trained model would be written over it"
            )


def _check_adapters(arguments: ModelArguments, folder: Path) -> None:
    """Keeps whole models and adapters from being taken for each other."""
    for name in ("model", "ref_model"):
        value = getattr(arguments, name, None)
        adapter = None
        if value is not None and Path(value).expanduser().is_dir():
            adapter = adapter_of(name, value)
        if adapter is not None and Path(adapter.base).resolve() == folder.resolve():
            raise ValueError(
                f"output_dir: expected another folder than that of the base model of {name}, got "
                f"{folder} for both"
            )
    new = getattr(arguments, "use_peft", False)
    _check_merged_base(arguments.model, folder, new)
    if new or not _holds_adapter(folder):
        return
    # Commands without the option make a whole model of an adapter and its base.
    continues = getattr(arguments, "continues_adapters", False)
    if not continues or adapter_of("model", arguments.model) is None:
        # `from_pretrained` would take the adapter and pass by the weights beside it.
        raise ValueError(
            f"output_dir: expected a folder without an adapter, {folder} holds one, which would be "
            "loaded in place of the trained model; choose another folder"
        )


def _check_merged_base(model: str, folder: Path, new: bool) -> None:
    """Keeps an adapter from lying beside a base that is not its own."""
    from fastdaa.train.adapter_files import MERGED_BASE

    merged = folder / MERGED_BASE
    if not merged.is_dir():
        return
    adapter = adapter_of("model", model)
    base = model if adapter is None else adapter.base
    if not (adapter is not None and new) and Path(base).resolve() != merged.resolve():
        raise ValueError(
            f"output_dir: expected a folder without the base model of another run, {folder} holds "
            f"{merged}; choose another folder"
        )


def _find_checkpoint(output_dir: str, given: str | None) -> str | None:
    if given is None or given.lower() in ("false", "no", "0"):
        _check_fresh(output_dir)
        return None
    if given.lower() in _TRUE_WORDS:
        last = to_continue(output_dir)
        found = f"resuming from {last}" if last else f"no complete checkpoint in {output_dir}"
        logger.info("%s%s", found, "" if last else ": starting from the beginning")
        return last
    if not Path(given).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {given}")
    if not is_complete(given):
        raise ValueError(
            f"resume_from_checkpoint: expected a complete checkpoint, {given} has no readable "
            "trainer_state.json, which is written last"
        )
    check_files(given)
    if Path(given).resolve().parent != Path(output_dir).resolve():
        _check_fresh(output_dir)
    return given


def _check_fresh(output_dir: str) -> None:
    """Keeps a run out of the folder of another one, whose checkpoints it would write over."""
    found = complete(output_dir)
    if found:
        raise ValueError(
            f"output_dir: expected a folder without checkpoints for a new run, {output_dir} holds "
            f"{found[-1][1].name} of an earlier one; add --resume_from_checkpoint to continue "
            "that, choose another folder, or delete this one"
        )


def _check_no_model(folder: Path, checkpoint: str | None) -> None:
    """Keeps a run from writing over what another one has made, unless it is its continuation."""
    if checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve():
        return
    weights = sorted(p.name for p in folder.glob("*model*") if p.suffix in _WEIGHT_SUFFIXES)
    if weights:
        raise ValueError(
            f"output_dir: expected a folder without a model for a new run, {folder} holds "
            f"{weights[0]} of an earlier one, which would be written over; choose another folder, "
            "or delete this one"
        )
