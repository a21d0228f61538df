"""A disk that is full is said, with the folder and what is kept."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from fastdaa.train.full_disk import FullDiskError, full_disk_named

TORCH = "[enforce fail at inline_container.cc:672] . unexpected pos 1624896 vs 1624788"
SAFETENSORS = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(TORCH),
        RuntimeError("basic_ios::clear: iostream error"),
        SafetensorError(SAFETENSORS),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/data/out/metrics.jsonl"),
        Exception("No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        OSError(errno.EFBIG, "File too large"),
    ],
    ids=[
        *("torch", "torch stream", "safetensors", "system", "quota", "tokenizers"),
        *("file size, safetensors", "file size"),
    ],
)
def test_errors_of_a_full_disk(tmp_path, error):
    with pytest.raises(FullDiskError) as caught, full_disk_named(tmp_path, "the model"):
        raise error
    said = str(caught.value)
    assert said.startswith("output_dir: expected room on the disk for the model, writing into ")
    place = getattr(error, "filename", None) or str(tmp_path)
    assert f"writing into {place} failed with " in said and "MiB left" in said
    assert "no checkpoint was finished before" in said
    # Said once, where it happened.
    with pytest.raises(FullDiskError) as again, full_disk_named(tmp_path, "something"):
        raise caught.value
    assert again.value is caught.value


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "no"), OSError("x")]
)
def test_other_errors_stay(tmp_path, error):
    with pytest.raises(type(error)) as caught, full_disk_named(tmp_path, "the model"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Parent directory /data/out/checkpoint-3 does not exist."),
        SafetensorError("I/O error: No such file or directory (os error 2)"),
    ],
    ids=["torch", "safetensors"],
)
def test_a_folder_that_was_removed(tmp_path, error):
    with (
        pytest.raises(FileNotFoundError, match="to stay while the run lives, but a folder was"),
        full_disk_named(tmp_path, "the model"),
    ):
        raise error


def test_a_checkpoint_names_itself_and_the_one_before(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2)
    save = torch.save

    def full(what, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and str(path).endswith("optimizer.pt"):
            raise RuntimeError(TORCH)
        save(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    said = "the checkpoint of step 4, .*checkpoint-2 is whole, and --resume_from_checkpoint"
    with pytest.raises(OSError, match=said):
        trainer.train()
    monkeypatch.undo()
    again = make_trainer(max_steps=4, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_rows_that_cannot_be_written(make_trainer, tmp_path):
    from fastdaa.cli.runs import train_and_save

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(FullDiskError, match=f"for what the run writes, writing into {tmp_path}"):
        train_and_save("train", make_trainer(), None, [])


def test_reference_log_probs_that_cannot_be_written(make_trainer, tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FullDiskError, match=r"ref_cache_dir: expected room .*cache/[0-9a-f]+ "):
        make_trainer(precompute_ref_log_probs=True)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_folder_of_reference_log_probs_that_is_a_file(make_trainer, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(ValueError, match=r"ref_cache_dir: expected a folder to write to, .*cache "):
        make_trainer(precompute_ref_log_probs=True)
