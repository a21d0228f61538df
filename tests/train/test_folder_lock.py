"""Two runs in one folder: the second one is told who is there."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import socket
import subprocess
import sys

import pytest

from fastdaa.cli import main
from fastdaa.train import folder_lock
from fastdaa.train.folder_lock import LOCK_FILE, lock_folder

HOLDER = """
import sys, time, os
from fastdaa.train.folder_lock import lock_folder
lock = lock_folder(sys.argv[1])
child = os.fork() if len(sys.argv) > 2 else 1
if child:
    print("locked", child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder():
    """``holder(folder)``: a process that has the lock, and perhaps a child of it."""
    started = []

    def start(folder, *more):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), *more], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        word, child = process.stdout.readline().split()
        assert word == "locked"
        return process, int(child)

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_another_process_is_named_and_its_death_frees_the_folder(holder, make_trainer, tmp_path):
    process, child = holder(tmp_path / "out", "forks")
    said = rf"out is in use by process {process.pid} on {socket.gethostname()} \(since 2"
    try:
        with pytest.raises(BlockingIOError, match=said):
            lock_folder(tmp_path / "out")
        trainer = make_trainer()
        with pytest.raises(ValueError, match=said):
            trainer.train()
        assert os.listdir(tmp_path / "out") == [LOCK_FILE]
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # what it has forked lives on, and does not keep the lock
        trainer.train()
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_command_says_so_before_anything_slow(holder, tiny_model, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("{}")
    process, _ = holder(tmp_path / "out")
    argv = [
        *("train", "--model", f"{tmp_path}/model", "--dataset", f"{tmp_path}/pairs.jsonl"),
        *("--output_dir", f"{tmp_path}/out", "--use_cpu"),
    ]
    assert main(argv) == 2
    assert f"is in use by process {process.pid} on" in capsys.readouterr().err


def test_one_process_may_train_again_in_its_folder(make_trainer):
    first = make_trainer()
    first.train()
    second = make_trainer()
    second.train()


def test_the_lock_goes_with_who_holds_it(tmp_path):
    first = lock_folder(tmp_path)
    assert lock_folder(tmp_path / ".") is first
    del first
    gc.collect()
    assert not folder_lock._locks


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_goes_on_where_folders_cannot_be_locked(tmp_path, monkeypatch, caplog, code):
    import fcntl

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING, "fastdaa"):
        assert lock_folder(tmp_path) is None
    assert f"{tmp_path} cannot be locked" in caplog.text


def test_goes_on_beside_a_file_of_somebody_else(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with caplog.at_level(logging.WARNING, "fastdaa"):
        assert lock_folder(tmp_path) is None
    assert "cannot be locked" in caplog.text
