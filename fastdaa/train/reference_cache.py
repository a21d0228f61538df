"""Reference log-probs on disk: one store a reference, one entry a tokenised pair.

An entry depends on the weights of the reference, the dtype it computes in, the options of the head
and the tokens of the pair after truncation, and on nothing else: not on the output folder, the
objective, the batch size, the layout or the order. So runs that differ only in those share entries,
and a subset of a dataset finds its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastdaa.counted import counted
from fastdaa.data.fields import SKIP_FIELDS, TOKEN_FIELDS
from fastdaa.data.rows import PairRows
from fastdaa.whole_file import remove_abandoned, whole_file

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
KEY_BYTES = 16
_PART, _SUFFIX = "part-", ".safetensors"
_CHUNK_BYTES = 64 << 20
_ROWS_AT_ONCE = 4096


class ReferenceCache:
    """Append-only store of the log-probs of pairs under one reference.

    Every ``append`` writes a file of its own and renames it into place, so that a process that is
    killed leaves whole parts or nothing, and several processes may append at once. Parts that
    others have added since are read when an entry is missing. Where two parts hold the same entry,
    the older one counts.

    Args:
        root: the folder of all stores.
        model_key: which reference, see :func:`store_key`.
    """

    def __init__(self, root: str | Path, model_key: str) -> None:
        self.folder = Path(root).expanduser() / model_key
        self._read: set[str] = set()
        self._warned = False
        self._parts: list[Tensor] = []
        self._rows = 0
        self._index: dict[bytes, int] = {}
        self._tokens: dict[bytes, tuple[Tensor, Tensor]] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._index)

    def refresh(self) -> None:
        """Reads the parts that were added since."""
        if not self.folder.is_dir():
            return
        names = (path.name for path in self.folder.glob(f"{_PART}*{_SUFFIX}"))
        for name in sorted(set(names) - self._read):
            self._read.add(name)
            self._read_part(self.folder / name)

    def missing(self, row_keys: Sequence[bytes], *, tokens: bool = False) -> list[int]:
        """Places in ``row_keys`` without an entry; of equal keys only the first.

        Args:
            row_keys: of any length, from :func:`hash_rows`.
            tokens: entries without token log-probs count as missing.
        """
        found: Mapping[bytes, Any] = self._tokens if tokens else self._index
        if any(key not in found for key in row_keys):
            self.refresh()
        places: dict[bytes, int] = {}
        for place, key in enumerate(row_keys):
            if key not in found:
                places.setdefault(key, place)
        return list(places.values())

    def append(
        self,
        row_keys: Sequence[bytes],
        logps: Tensor,
        token_logps: Sequence[Tensor] | None = None,
    ) -> None:
        """Writes entries, all of them or none.

        Args:
            row_keys: ``n`` keys.
            logps: ``[n, 2]`` sums over the chosen and the rejected completion, in nats.
            token_logps: ``2 n`` tensors ``[tokens]`` in pair-major order, or None.

        Raises:
            ValueError: shapes that do not fit together.
        """
        count = len(row_keys)
        if tuple(logps.shape) != (count, 2):
            raise ValueError(f"logps: expected shape [{count}, 2], got {list(logps.shape)}")
        if token_logps is not None and len(token_logps) != 2 * count:
            raise ValueError(f"token_logps: expected {2 * count} tensors, got {len(token_logps)}")
        if not count:
            return
        part = {"keys": _pack_keys(row_keys), "logps": _to_host(logps).contiguous()}
        if token_logps is not None:
            part["token_counts"] = torch.tensor([t.numel() for t in token_logps]).view(-1, 2)
            part["token_logps"] = torch.cat([_to_host(t).flatten() for t in token_logps])
        self._read.add(_write_part(self.folder, part))
        self._add(part)

    def lookup(self, row_keys: Sequence[bytes]) -> Tensor:
        """Log-probs ``[n, 2]`` fp32 of chosen and rejected.

        Raises:
            KeyError: an entry is missing.
        """
        self._require(row_keys, tokens=False)
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        if not row_keys:
            return torch.empty(0, 2)
        return self._parts[0][[self._index[key] for key in row_keys]]

    def lookup_tokens(self, row_keys: Sequence[bytes]) -> list[Tensor]:
        """Token log-probs fp32: ``2 n`` tensors ``[tokens]`` in pair-major order.

        Raises:
            KeyError: an entry, or its token log-probs, are missing.
        """
        self._require(row_keys, tokens=True)
        return [side for key in row_keys for side in self._tokens[key]]

    def _require(self, row_keys: Sequence[bytes], *, tokens: bool) -> None:
        absent = self.missing(row_keys, tokens=tokens)
        if absent:
            what = "token log-probs" if tokens else "log-probs"
            raise KeyError(
                f"expected reference {what} of {counted(len(row_keys), 'row')} in {self.folder}, "
                f"{len(absent)} missing, row {absent[0]} first"
            )

    def _read_part(self, path: Path) -> None:
        from safetensors.torch import load

        try:
            part = load(path.read_bytes())
            _check_part(part)
        except Exception as error:
            # Disks and copies break files in any way; what is in such a part is computed again.
            if not self._warned:
                logger.warning("%s is damaged and ignored, as any other such part: %s", path, error)
                self._warned = True
            return
        self._add(part)

    def _add(self, part: Mapping[str, Tensor]) -> None:
        keys = _unpack_keys(part["keys"])
        for offset, key in enumerate(keys):
            self._index.setdefault(key, self._rows + offset)
        self._parts.append(part["logps"])
        self._rows += len(keys)
        if "token_logps" in part:
            sides = part["token_logps"].split(part["token_counts"].flatten().tolist())
            for offset, key in enumerate(keys):
                self._tokens.setdefault(key, (sides[2 * offset], sides[2 * offset + 1]))


def store_key(weights: str, **settings: Any) -> str:
    """Name of the store of a reference.

    Args:
        weights: from :func:`hash_weights`.
        settings: what else changes log-probs: dtype under autocast, softcap, temperature, token
            weights; anything whose ``str`` says it.
    """
    facts = {"weights": weights, "format": FORMAT_VERSION, **settings}
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()


def hash_weights(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, dtypes, shapes and bytes, whatever the order and the device.

    Bytes are streamed in pieces of 64 MiB. Sharded tensors have to be gathered by the caller.

    Raises:
        ValueError: a tensor without data (on the meta device).
    """
    tensors = sorted(named_tensors, key=lambda item: item[0])
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
    # hashlib lets other threads run while it works.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda item: _hash_tensor(item[1]), tensors))
    whole = hashlib.blake2b(digest_size=32)
    for (name, tensor), digest in zip(tensors, digests, strict=True):
        whole.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|{digest}\n".encode())
    return whole.hexdigest()


def hash_rows(dataset: Dataset) -> list[bytes]:
    """16-byte key of every row: its token ids after truncation, and its skips.

    Args:
        dataset: tokenised, as :func:`fastdaa.data.tokenize_pairs` returns it.
    """
    rows, keys = PairRows(dataset), []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(rows))
        keys += [_hash_row(row) for row in rows.__getitems__(range(start, stop))]
    return keys


def _hash_row(row: Mapping[str, Any]) -> bytes:
    ids = [np.asarray(row[field], dtype="<i4") for field in TOKEN_FIELDS]
    # A row without skips is one whose skips are 0.
    numbers = [len(side) for side in ids] + [int(row.get(field) or 0) for field in SKIP_FIELDS]
    digest = hashlib.blake2b(np.asarray(numbers, dtype="<i8").tobytes(), digest_size=KEY_BYTES)
    for side in ids:
        digest.update(side.tobytes())
    return digest.digest()


def _hash_tensor(tensor: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=32)
    if tensor.numel():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in raw.split(_CHUNK_BYTES):
            digest.update(piece.cpu().numpy().data)
    return digest.hexdigest()


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32)


def _pack_keys(keys: Sequence[bytes]) -> Tensor:
    if any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"row_keys: expected keys of {KEY_BYTES} bytes")
    packed = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
    return torch.from_numpy(packed.copy())


def _unpack_keys(packed: Tensor) -> list[bytes]:
    raw = packed.numpy().tobytes()
    return [raw[start : start + KEY_BYTES] for start in range(0, len(raw), KEY_BYTES)]


def _write_part(folder: Path, part: dict[str, Tensor]) -> str:
    from safetensors.torch import save

    remove_abandoned(folder, f".{_PART}*{_SUFFIX}.*.partial")
    # Sorted names are in the order of time, so the older of two equal entries is read first.
    name = f"{_PART}{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
    with whole_file(folder / name) as partial, partial.open("wb") as file:
        file.write(save(part))
        file.flush()
        os.fsync(file.fileno())
    return name


def _check_part(part: Mapping[str, Tensor]) -> None:
    count = part["keys"].shape[0]
    if part["keys"].shape != (count, KEY_BYTES) or part["logps"].shape != (count, 2):
        raise ValueError("expected keys [n, 16] and logps [n, 2]")
    if "token_logps" in part:
        counts = part["token_counts"]
        if counts.shape != (count, 2) or int(counts.sum()) != part["token_logps"].numel():
            raise ValueError("expected as many token log-probs as token_counts say")
