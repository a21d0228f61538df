"""Records of a file, a folder, the hub or a dataset in memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.data.errors import DataError
from fastdaa.data.fields import PLACE_FIELD
from fastdaa.data.readers import Records, kind_of, read_file
from fastdaa.data.reports import SkipReport

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=$|[^a-zA-Z])")
_SHARD = re.compile(r"([\w.]+)-\d{5}-of-\d{5}\.")
_CARD = re.compile(r"---\s*\n(?:(?!---).*\n)*?configs:")


class Source(NamedTuple):
    """A source as text names it."""

    path: str
    """A path or hub id."""
    name: str | None = None
    """Configuration of a hub dataset, perhaps of one that was downloaded into a folder."""
    split: str | None = None


def parse_source(text: str) -> Source:
    """Reads ``owner/name:config``, ``owner/name:config:split`` or ``path::split``.

    What exists is a path, whatever is in its name; text that is none of these is a path, too.

    Raises:
        DataError: a configuration of a local path whose dataset card names none.
    """
    if ":" not in text or Path(text).expanduser().exists():
        return Source(text)
    for colons in (1, 2):
        base, *rest = text.rsplit(":", colons)
        local = Path(base).expanduser().exists()
        if len(rest) < colons or not (local or _is_hub_id(base)):
            continue
        name, split = [*rest, ""][:2]
        if local and name and not _has_card(Path(base).expanduser()):
            raise DataError(
                f"{text}: expected '{base}::{split or name}' for a split, got {name!r} as a "
                "configuration, which only datasets of the hub have"
            )
        return Source(base, name or None, split or None)
    return Source(text)


def without_split(text: str) -> str:
    """A source without the split that it names."""
    source = parse_source(text)
    return source.path if source.name is None else f"{source.path}:{source.name}"


def has_configurations(text: str) -> bool:
    """Whether a source that text names may have several configurations."""
    path = Path(parse_source(text).path).expanduser()
    return not path.exists() or (path.is_dir() and _has_card(path))


def open_source(
    source: str | PathLike[str] | Dataset, split: str | None, name: str | None
) -> Records:
    """Records of a source as :func:`fastdaa.data.load_pairs` takes it, of one split.

    Args:
        split, name: for a source that does not say them itself.

    Raises:
        DataError: a source that cannot be found or read, or without the split.
    """
    if not isinstance(source, str | PathLike):
        return rows_of(_pick_split(source, split, "dataset"), "dataset")
    if isinstance(source, str):
        parsed = parse_source(source)
        source, name, split = parsed.path, parsed.name or name, parsed.split or split
    path = Path(source).expanduser()
    if path.is_file():
        _pick_name([_split_of(Path(path.name)) or "train"], split, str(path))
        return read_file(path)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            import datasets

            saved = datasets.load_from_disk(str(path))
            return rows_of(_pick_split(saved, split, str(path)), str(path))
        return chain.from_iterable(map(read_file, _files_of(path, split, name)))
    text = str(source)
    if not _is_hub_id(text):
        raise DataError(
            f"{text}: expected a file, a folder, or a hub id 'owner/name'; "
            "there is no such file or folder"
        )
    return rows_of(_pick_split(_load_from_hub(text, name), split, text), text)


def _is_hub_id(text: str) -> bool:
    return _HUB_ID.fullmatch(text) is not None and not kind_of(Path(text))


def _load_from_hub(hub_id: str, name: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(hub_id, name)
    except Exception as error:
        # Anything may go wrong between here and the hub; the first line says what did.
        what = (str(error).strip().splitlines() or ["no message"])[0]
        raise DataError(
            f"{hub_id}: expected a local path or a hub dataset that can be reached; there is no "
            f"such path, and loading it from the hub failed: {type(error).__name__}: {what}"
        ) from error


def _has_card(folder: Path) -> bool:
    """Whether a dataset card (``README.md``) lists configurations, as in a download of the hub."""
    card = folder / "README.md"
    return card.is_file() and _CARD.match(card.read_text("utf-8", "replace")) is not None


def _files_of(folder: Path, split: str | None, name: str | None) -> list[Path]:
    if _has_card(folder):
        found = _files_of_card(folder, name)
        return found[_pick_name(list(found), split, str(folder))]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and kind_of(path))
    if not files:
        expected = "files that end with .jsonl, .json, .csv or .parquet (or .gz)"
        raise DataError(f"{folder}: expected {expected}, or a saved dataset; found none")
    splits = [_split_of(path.relative_to(folder)) or "train" for path in files]
    wanted = _pick_name(sorted(set(splits)), split, str(folder))
    return [path for path, found in zip(files, splits, strict=True) if found == wanted]


def _files_of_card(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """The files of every split of a configuration, as ``datasets`` finds them."""
    import datasets

    try:
        config: Any = datasets.load_dataset_builder(str(folder), name).config
    except Exception as error:
        what = " ".join(str(error).split("\nExample")[0].split())
        raise DataError(
            f"{folder}: expected a folder that can be read as its README.md says, got "
            f"{type(error).__name__}: {what}"
        ) from error
    return {
        str(split): [Path(file) for file in files] for split, files in config.data_files.items()
    }


def _split_of(path: Path) -> str | None:
    """The split that a file's name, or the folder it lies in, begins with.

    ``train_prefs-00000-of-00001.parquet`` is of ``train_prefs``, as on the hub.
    """
    for part in (path.name, path.parent.name):
        match = _SPLIT_NAME.match(part.lower())
        if match:
            shard = _SHARD.match(part)
            return shard[1] if shard else match[1]
    return None


def _pick_split(loaded: Any, split: str | None, source: str) -> Any:
    if isinstance(loaded, Mapping):
        return loaded[_pick_name(list(loaded), split, source)]
    own = str(getattr(loaded, "split", None) or "train")
    _pick_name([own], split, source)
    return loaded


def _pick_name(splits: list[str], split: str | None, source: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    wanted = split or "train"
    if wanted in splits:
        if split is None:
            logger.info("%s: split %s is taken, of %s", source, wanted, ", ".join(splits))
        return wanted
    got = "no split given" if split is None else repr(split)
    raise DataError(f"{source}: split: expected one of {', '.join(splits)}, got {got}")


def rows_of(dataset: Any, source: str) -> Records:
    """Rows of a ``datasets.Dataset``; ``source`` begins their places.

    Those of a mixture have the place in their own source behind that.
    """
    number = 0
    for columns in dataset.with_format(None).iter(batch_size=1024):
        fields = list(columns)
        for values in zip(*columns.values(), strict=True):
            number += 1
            row = dict(zip(fields, values, strict=True))
            origin = row.pop(PLACE_FIELD, None)
            place = f"{source}: row {number}"
            yield place if origin is None else f"{place} ({origin})", row


def name_of(source: object) -> str:
    """A source as error messages call it."""
    return str(source) if isinstance(source, str | PathLike) else "dataset"


def nothing_in(source: object, unit: str, report: SkipReport) -> DataError:
    """The error for a source without a usable ``unit``, with what was left out."""
    detail = f" ({str(report).splitlines()[0]})" if report.skipped else ""
    return DataError(f"{name_of(source)}: expected at least one {unit}, got none{detail}")
