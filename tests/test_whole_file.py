"""Files that are there as a whole or not at all, also beside processes that were killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from fastdaa.whole_file import remove_abandoned, unfinished, whole_file

BEGIN = """
import pathlib, sys, time
from fastdaa.whole_file import unfinished
with unfinished(sys.argv[1], folder=sys.argv[2] == "folder") as partial:
    (partial / "part" if partial.is_dir() else partial).write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
    partial.rename(sys.argv[1])
"""


@contextmanager
def writer(path, kind):
    """Another process, which has begun to write ``path`` and ends when its input does."""
    with subprocess.Popen(
        [sys.executable, "-c", BEGIN, path, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "writing\n"
        yield process


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    with whole_file(path) as partial:
        partial.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("ha")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"), whole_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError) as caught, whole_file(path) as partial:
        raise OSError(errno.ENOSPC, "No space left on device", str(partial))
    assert str(caught.value).endswith(f"No space left on device: '{path}'")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_is_named_once(tmp_path):
    path = tmp_path / "place"
    path.mkdir()
    with pytest.raises(IsADirectoryError) as caught, whole_file(path):
        pass
    assert str(caught.value).endswith(f"Is a directory: '{path}'")
    assert list(tmp_path.iterdir()) == [path] and not list(path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_with_the_next_writing(tmp_path, kind):
    path = tmp_path / "points [1]"
    with writer(path, kind) as process:
        process.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    with unfinished(path, folder=kind == "folder") as partial:
        assert list(tmp_path.iterdir()) == [partial] and left != partial
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_living_process_writes_stays(tmp_path, kind):
    path = tmp_path / "points"
    with writer(path, kind) as process:
        (theirs,) = tmp_path.iterdir()
        remove_abandoned(tmp_path, ".*.partial")
        with unfinished(path, folder=kind == "folder") as partial:
            assert {*tmp_path.iterdir()} == {partial, theirs}
        process.stdin.close()
    assert list(tmp_path.iterdir()) == [path]
    assert ((path / "part") if kind == "folder" else path).read_text() == "half"


@pytest.mark.parametrize("folder", [False, True])
def test_a_place_where_nothing_can_be_made_is_an_error(tmp_path, monkeypatch, folder):
    def cannot(path, *options):  # as in /proc
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    monkeypatch.setattr(
        "fastdaa.whole_file.os.mkdir" if folder else "fastdaa.whole_file.os.open", cannot
    )
    with pytest.raises(FileNotFoundError), unfinished(tmp_path / "file", folder=folder):
        pass


def test_files_of_others_stay(tmp_path):
    names = [".other.1.partial", "file.1.partial", ".file.swp"]
    for name in names:
        (tmp_path / name).touch()
    with whole_file(tmp_path / "file") as partial:
        partial.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "file"])


def test_a_file_taken_for_abandoned_before_its_lock_is_made_again(tmp_path, monkeypatch):
    path, opened = tmp_path / "file", os.open

    def open_late(name, *options):
        file = opened(name, *options)
        if str(name).endswith(".partial") and not late:
            late.append(name)
            os.unlink(name)
        return file

    late: list[str] = []
    monkeypatch.setattr("fastdaa.whole_file.os.open", open_late)
    with whole_file(path) as partial:
        assert late and partial.is_file()
    assert path.is_file()


def test_without_locks_files_are_written_and_nothing_is_removed(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    left = tmp_path / ".file.1.partial"
    left.touch()
    with whole_file(tmp_path / "file") as partial:
        partial.write_text("new")
    assert sorted(tmp_path.iterdir()) == [left, tmp_path / "file"]
