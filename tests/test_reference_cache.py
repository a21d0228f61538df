"""The store of reference log-probs: what shares entries, what does not, and what survives."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from fastdaa.train.reference_cache import ReferenceCache, hash_rows, hash_weights, store_key

ROWS = {
    "prompt_ids": [[1, 2], [1], [7, 8, 9]],
    "chosen_ids": [[3], [2, 3], [4]],
    "rejected_ids": [[4, 5], [6], [5, 6]],
}
LOGPS = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])


def rows(**changed: Any) -> Dataset:
    return Dataset.from_dict({**ROWS, **changed})


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    return ReferenceCache(tmp_path, "model")


def test_round_trip_in_another_order(tmp_path: Path, cache: ReferenceCache) -> None:
    keys = hash_rows(rows())
    assert cache.missing(keys) == [0, 1, 2]
    cache.append(keys[:2], LOGPS[:2])
    cache.append(keys[2:], LOGPS[2:].double())
    again = ReferenceCache(tmp_path, "model")
    assert len(again) == 3
    assert again.missing(keys) == []
    found = again.lookup([keys[2], keys[0]])
    assert found.dtype == torch.float32
    assert torch.equal(found, LOGPS[[2, 0]])


def test_other_columns_and_subsets_share_entries(cache: ReferenceCache) -> None:
    cache.append(hash_rows(rows()), LOGPS)
    subset = rows().add_column("text", ["a", "b", "c"]).select([2, 1])
    assert torch.equal(cache.lookup(hash_rows(subset)), LOGPS[[2, 1]])


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"prompt_ids": [[1, 3], [1], [7, 8, 9]]}, id="a token of the prompt"),
        pytest.param({"rejected_ids": [[4], [6], [5, 6]]}, id="truncated"),
        pytest.param({"prompt_ids": [[1], [1], [7, 8, 9]], "chosen_ids": [[2, 3], [2, 3], [4]]},
                     id="another split point"),
        pytest.param({"chosen_skip": [1, 0, 0], "rejected_skip": [0, 0, 0]}, id="skip"),
    ],
)  # fmt: skip
def test_changed_row_is_a_miss(cache: ReferenceCache, changed: dict[str, Any]) -> None:
    cache.append(hash_rows(rows()), LOGPS)
    assert cache.missing(hash_rows(rows(**changed))) == [0]


def test_skips_of_zero_are_no_skips() -> None:
    assert hash_rows(rows(chosen_skip=[0] * 3, rejected_skip=[0] * 3)) == hash_rows(rows())


def test_equal_rows_are_missing_once(cache: ReferenceCache) -> None:
    keys = hash_rows(rows().select([0, 1, 0]))
    assert cache.missing(keys) == [0, 1]
    cache.append(keys[:2], LOGPS[:2])
    assert torch.equal(cache.lookup(keys), LOGPS[[0, 1, 0]])


def test_missing_entries_are_named(cache: ReferenceCache) -> None:
    keys = hash_rows(rows())
    cache.append(keys[:1], LOGPS[:1])
    with pytest.raises(KeyError, match="2 missing, row 1 first"):
        cache.lookup(keys)
    with pytest.raises(KeyError, match="token log-probs"):
        cache.lookup_tokens(keys[:1])


def test_tokens(tmp_path: Path, cache: ReferenceCache) -> None:
    keys = hash_rows(rows())
    cache.append(keys[:1], LOGPS[:1])
    assert cache.missing(keys[:1], tokens=True) == [0]
    sides = [torch.full((count,), -float(count)) for count in (1, 2, 2, 1, 0, 2)]
    cache.append(keys, LOGPS, sides)
    for store in (cache, ReferenceCache(tmp_path, "model")):
        found = store.lookup_tokens([keys[2], keys[0]])
        assert [side.tolist() for side in found] == [[], [-2.0, -2.0], [-1.0], [-2.0, -2.0]]


@pytest.mark.parametrize(
    ("logps", "tokens", "message"),
    [
        pytest.param(LOGPS[:2], None, r"logps: expected shape \[3, 2\]", id="logps"),
        pytest.param(LOGPS, [torch.ones(1)], "expected 6 tensors, got 1", id="tokens"),
    ],
)
def test_shapes(cache: ReferenceCache, logps: torch.Tensor, tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache.append(hash_rows(rows()), logps, tokens)
    assert cache.missing(hash_rows(rows())) == [0, 1, 2]


def test_damaged_and_unfinished_parts(
    tmp_path: Path, cache: ReferenceCache, caplog: pytest.LogCaptureFixture
) -> None:
    keys = hash_rows(rows())
    for place in range(3):
        cache.append(keys[place : place + 1], LOGPS[place : place + 1])
    parts = sorted(cache.folder.glob("part-*"))
    for part in parts[:2]:
        part.write_bytes(part.read_bytes()[:-3])
    half = cache.folder / f".{parts[2].name}.1.partial"
    half.write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        again = ReferenceCache(tmp_path, "model")
    assert again.missing(keys) == [0, 1]
    assert len(caplog.records) == 1
    assert "is damaged" in caplog.text
    again.append(keys[:1], LOGPS[:1])
    assert not half.exists()


def test_sees_what_others_append(tmp_path: Path, cache: ReferenceCache) -> None:
    keys = hash_rows(rows())
    other = ReferenceCache(tmp_path, "model")
    other.append(keys, LOGPS)
    assert cache.missing(keys) == []
    # Both have the first entry now; the older one counts for everybody.
    ReferenceCache(tmp_path, "model").append(keys[:1], LOGPS[:1] - 10)
    assert torch.equal(ReferenceCache(tmp_path, "model").lookup(keys[:1]), LOGPS[:1])


APPEND = """
import sys, torch
from fastdaa.train.reference_cache import ReferenceCache
cache = ReferenceCache(sys.argv[1], "model")
for n in range(int(sys.argv[2]), int(sys.argv[3])):
    cache.append([n.to_bytes(16, "big")], torch.full((1, 2), float(n)))
    print(n, flush=True)
"""


def start(folder: Path, first: int, stop: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APPEND, str(folder), str(first), str(stop)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_one_of_them_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    endless, finite = start(tmp_path, 1000, 10**9), start(tmp_path, 0, 20)
    try:
        assert endless.stdout is not None
        written = [int(endless.stdout.readline()) for _ in range(5)]
        finite.communicate(timeout=180)
    finally:
        endless.kill()
        endless.communicate()
    keys = [n.to_bytes(16, "big") for n in (*range(20), *written)]
    found = ReferenceCache(tmp_path, "model").lookup(keys)
    assert found[:, 0].tolist() == [*range(20), *written]
    assert not caplog.records


def test_store_key_depends_on_what_matters(tmp_path: Path) -> None:
    weights = hash_weights([("w", torch.ones(2))])
    key = store_key(weights, dtype=torch.float32, softcap=None)
    assert key == store_key(weights, softcap=None, dtype=torch.float32)
    assert key != store_key(weights, dtype=torch.bfloat16, softcap=None)
    assert key != store_key(weights, dtype=torch.float32, softcap=30.0)
    assert key != store_key(hash_weights([("w", torch.zeros(2))]), dtype=torch.float32)
    ReferenceCache(tmp_path, key).append(hash_rows(rows()), LOGPS)
    assert ReferenceCache(tmp_path, store_key("other")).missing(hash_rows(rows())) == [0, 1, 2]


WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.int8)}


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"a": torch.arange(6.0).reshape(3, 2)}, id="shape"),
        pytest.param({"a": WEIGHTS["a"].to(torch.bfloat16)}, id="dtype"),
        pytest.param({"a": WEIGHTS["a"].nextafter(torch.tensor(9.0))}, id="last bit"),
        pytest.param({"b": torch.tensor(2, dtype=torch.int8)}, id="scalar"),
        pytest.param({"c": torch.empty(0)}, id="one more"),
    ],
)
def test_hash_weights_changes(changed: dict[str, torch.Tensor]) -> None:
    assert hash_weights({**WEIGHTS, **changed}.items()) != hash_weights(WEIGHTS.items())


def test_hash_weights_ignores_order_and_strides() -> None:
    transposed = {"b": WEIGHTS["b"], "a": WEIGHTS["a"].T.contiguous().T}
    assert not transposed["a"].is_contiguous()
    assert hash_weights(transposed.items()) == hash_weights(WEIGHTS.items())


def test_hash_weights_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hash_weights(WEIGHTS.items())
    monkeypatch.setattr("fastdaa.train.reference_cache._CHUNK_BYTES", 5)
    assert hash_weights(WEIGHTS.items()) == whole


def test_hash_weights_without_data() -> None:
    with pytest.raises(ValueError, match="meta device"):
        hash_weights([("w", torch.ones(2, device="meta"))])
